"""A room of our own in ALFWorld's format: a mug on a desk and a closed drawer."""

import json
from pathlib import Path

PROBLEM = """
(define (problem room)
  (:domain alfred)
  (:objects
    agent1 - agent
    Desk_bar_1 Drawer_bar_1 - receptacle
    Mug_bar_1 Pen_bar_1 - object
    start at_desk at_drawer - location
    DeskType DrawerType - rtype
    MugType PenType - otype)
  (:init
    (= (total-cost) 0)
    (atLocation agent1 start)
    (receptacleAtLocation Desk_bar_1 at_desk) (receptacleAtLocation Drawer_bar_1 at_drawer)
    (receptacleType Desk_bar_1 DeskType) (receptacleType Drawer_bar_1 DrawerType)
    (openable Drawer_bar_1)
    (canContain DeskType MugType) (canContain DrawerType MugType)
    (canContain DeskType PenType) (canContain DrawerType PenType)
    (objectType Mug_bar_1 MugType) (objectType Pen_bar_1 PenType)
    (pickupable Mug_bar_1) (pickupable Pen_bar_1)
    (objectAtLocation Mug_bar_1 at_desk) (objectAtLocation Pen_bar_1 at_desk)
    (inReceptacle Mug_bar_1 Desk_bar_1) (inReceptacle Pen_bar_1 Desk_bar_1))
  (:goal (inReceptacle Mug_bar_1 Drawer_bar_1)))
"""
WALKTHROUGH = ["go to desk 1", "take mug 1 from desk 1", "go to drawer 1", "open drawer 1", "move mug 1 to drawer 1"]


def write_room(data: Path, *, kind: str = "pick_and_place_simple", name: str = "trial_1") -> Path:
    """Write the room below a data folder as `alfworld-download` would, and return its game file."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    folder = data / "json_2.1.1" / "train" / f"{kind}-Mug-None-Drawer-1" / name
    folder.mkdir(parents=True)
    (folder / "traj_data.json").write_text(json.dumps({"task_type": kind}))
    grammar = Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", "put a mug in drawer")
    game = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": grammar,
        "pddl_problem": PROBLEM,
        "solvable": True,
        "walkthrough": WALKTHROUGH,
    }
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps(game))
    return path
