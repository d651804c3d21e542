"""The kitchen's map, and where things can be. Tests: tests/envs/test_overcooked.py.

The outer tiles are counters with stations, the 25 inner ones floor. Each station is used from one floor tile.
"""

import numpy as np

SIZE, VIEW = 7, 2  # the cook sees what is at most so many rows and columns away
CHOPS = 3  # cuts that make an ingredient chopped
INGREDIENTS = ("tomato", "lettuce", "onion")

# Stations: the places where the ingredients and the plate are kept, two cutting boards, the serving hatch.
PLATE, BOARDS, HATCH = 3, (4, 5), 6
STATION = np.array([(0, 1), (0, 5), (2, 6), (6, 3), (2, 0), (4, 0), (6, 5)])  # row and column
STAND = np.array([(1, 1), (1, 5), (2, 5), (5, 3), (2, 1), (4, 1), (5, 5)])
FLOOR = np.array([(row, column) for row in range(1, SIZE - 1) for column in range(1, SIZE - 1)])

# Where a thing is: a board's number, or one of these. The plate is never on a plate.
HOME, HAND, PLATED = 0, 1, 2
