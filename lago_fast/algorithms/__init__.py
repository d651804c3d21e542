"""Trainers: drop-in algorithms guided by a frozen prior."""
