"""Class sets: names, colours, and the ids that label files use for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Train id of pixels that neither loss nor score counts."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassSet:
    """The classes of a data set, in train-id order."""

    name: str
    names: tuple[str, ...]
    colours: NDArray[np.uint8] = field(compare=False, repr=False)
    """(classes, 3) RGB."""
    ignore_index: int = IGNORE
    output_ids: tuple[int, ...] = ()
    """The id that label files use for each train id; the train ids themselves by default."""

    def __post_init__(self) -> None:
        if not self.output_ids:
            object.__setattr__(self, "output_ids", tuple(range(len(self.names))))
        self.colours.setflags(write=False)

    def __len__(self) -> int:
        return len(self.names)

    def palette(self) -> NDArray[np.uint8]:
        """(256, 3) RGB for indexing with train ids; ids without a class are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colours
        return palette


def _class_set(name: str, classes: dict[str, Colour], output_ids: tuple[int, ...] = ()) -> ClassSet:
    colours = np.array(list(classes.values()), np.uint8)
    return ClassSet(name, tuple(classes), colours, output_ids=output_ids)


# Names, colours and label ids: cityscapesScripts, helpers/labels.py.
CITYSCAPES = _class_set(
    "cityscapes",
    {
        "road": (128, 64, 128),
        "sidewalk": (244, 35, 232),
        "building": (70, 70, 70),
        "wall": (102, 102, 156),
        "fence": (190, 153, 153),
        "pole": (153, 153, 153),
        "traffic light": (250, 170, 30),
        "traffic sign": (220, 220, 0),
        "vegetation": (107, 142, 35),
        "terrain": (152, 251, 152),
        "sky": (70, 130, 180),
        "person": (220, 20, 60),
        "rider": (255, 0, 0),
        "car": (0, 0, 142),
        "truck": (0, 0, 70),
        "bus": (0, 60, 100),
        "train": (0, 80, 100),
        "motorcycle": (0, 0, 230),
        "bicycle": (119, 11, 32),
    },
    output_ids=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
)

CITYSCAPES_LABEL_IDS = range(34)
"""Every id that a Cityscapes labelIds file may hold; those outside `output_ids` are ignored."""

# SegNet's 11 classes of CamVid, in the order of its label files.
CAMVID = _class_set(
    "camvid",
    {
        "Sky": (128, 128, 128),
        "Building": (128, 0, 0),
        "Pole": (192, 192, 128),
        "Road": (128, 64, 128),
        "Pavement": (0, 0, 192),
        "Tree": (128, 128, 0),
        "SignSymbol": (192, 128, 128),
        "Fence": (64, 64, 128),
        "Car": (64, 0, 128),
        "Pedestrian": (64, 64, 0),
        "Bicyclist": (0, 128, 192),
    },
)

CAMVID_SEGNET_VOID = 11
"""The id of unlabelled pixels in SegNet's label files."""

CAMVID_VOID_COLOUR: Colour = (0, 0, 0)

# The 32 colour classes of the original CamVid labels (label_colors.txt), by the SegNet class
# that each is merged into. Void, the 32nd, is ignored.
CAMVID_ORIGINAL: dict[str, dict[str, Colour]] = {
    "Sky": {"Sky": (128, 128, 128)},
    "Building": {
        "Archway": (192, 0, 128),
        "Bridge": (0, 128, 64),
        "Building": (128, 0, 0),
        "Tunnel": (64, 0, 64),
        "Wall": (64, 192, 0),
    },
    "Pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "Road": {
        "LaneMkgsDriv": (128, 0, 192),
        "LaneMkgsNonDriv": (192, 0, 64),
        "Road": (128, 64, 128),
    },
    "Pavement": {
        "ParkingBlock": (64, 192, 128),
        "RoadShoulder": (128, 128, 192),
        "Sidewalk": (0, 0, 192),
    },
    "Tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "SignSymbol": {
        "Misc_Text": (128, 128, 64),
        "SignSymbol": (192, 128, 128),
        "TrafficLight": (0, 64, 64),
    },
    "Fence": {"Fence": (64, 64, 128)},
    "Car": {
        "Car": (64, 0, 128),
        "OtherMoving": (128, 64, 64),
        "SUVPickupTruck": (64, 128, 192),
        "Train": (192, 64, 128),
        "Truck_Bus": (192, 128, 192),
    },
    "Pedestrian": {
        "Animal": (64, 128, 64),
        "CartLuggagePram": (64, 0, 192),
        "Child": (192, 128, 64),
        "Pedestrian": (64, 64, 0),
    },
    "Bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
}


def camvid_colour_ids() -> dict[Colour, int]:
    """Train id of each colour of the original CamVid labels."""
    merged = {
        colour: CAMVID.names.index(target)
        for target, sources in CAMVID_ORIGINAL.items()
        for colour in sources.values()
    }
    return {**merged, CAMVID_VOID_COLOUR: IGNORE}
