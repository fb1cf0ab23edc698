"""Draws a small VOC2007, VOC2012 and CUB_200_2011 in the official layouts: `python -m tools.sample_data`.

Every object is a vector silhouette in a square of 100 x 100 units (x right, y down) that is posed, coloured, rendered
on a drawn background and measured there, so boxes are the extent of the pixels that can be seen. All randomness of a
picture comes from (seed, data set, index of the picture), so each can be drawn again alone.
"""

import argparse
import colorsys
import json
import tempfile
from itertools import permutations
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
from tqdm import tqdm

from common.errors import UserError, exits_on_user_error

_FORMAT = 1  # of the drawing: raise it whenever the same seed would give other bytes, and old samples are redrawn
_MARKER = "sample.json"
_SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}
_SHARES = {1: (0.45, 0.7), 2: (0.36, 0.56), 3: (0.32, 0.48), 4: (0.3, 0.44)}  # of an object in the long side, by count
_BIRD_PICTURES, _TRAIN_PICTURES = 12, 8  # of each class
_SUPERSAMPLING = 3
_COLOURS = {"dark": "#23262e", "white": "#f6f3ea", "glass": "#a8d8f0", "pink": "#e8a0a0", "steel": "#9aa3ad"}

# class, view and its colours a, b, c; then the parts, back to front: kind, colour, numbers.
#   polygon/curve x y ...      filled outline with corners / smooth through the points
#   disc x y rx ry             filled ellipse             ring width x y rx ry       its outline
#   line/stroke width x y ...  open line with corners / smooth
_SILHOUETTES = """
aeroplane side #d3dcec #5f86c9 #f0b400
    polygon b 60 47 42 47 20 4 32 4
    polygon b 60 53 42 53 20 96 32 96
    polygon b 15 48 6 48 -3 30 6 30
    polygon b 15 52 6 52 -3 70 6 70
    curve a -5 50 6 45 45 43 82 44 100 50 82 56 45 57 6 55
    line 3.5 glass 86 46 90 50 86 54
    line 1.5 dark 16 50 74 50
    disc c 40 24 6 3
    disc c 40 76 6 3
bicycle side #e0304a #2b2f38
    ring 4.5 b 20 70 19 19
    ring 4.5 b 80 70 19 19
    line 1 steel 6 60 34 80
    line 1 steel 6 80 34 60
    line 1 steel 66 60 94 80
    line 1 steel 66 80 94 60
    line 5 a 20 70 38 36 66 36 80 70
    line 5 a 20 70 48 70 38 36
    line 5 a 48 70 66 36
    line 4 a 38 36 35 27
    line 4 a 66 36 63 22
    line 7 b 26 26 46 26
    line 4 b 60 22 76 19
    disc steel 48 70 5 5
bird side #2f8fd6 #f6b93b #1d5fa0
    line 3 dark 48 72 46 92 56 92
    line 3 dark 58 72 60 92 70 92
    polygon c 28 56 -4 64 0 74 32 70
    curve a 20 60 34 42 56 36 64 24 76 18 87 26 86 42 76 62 56 76 34 72
    curve b 86 42 76 62 58 75 44 72 62 58 74 44
    curve c 14 66 34 46 56 46 60 56 44 68
    polygon b 86 25 104 32 86 37
    disc white 77 29 4 4
    disc dark 78 29 2.5 2.5
boat side #f7f1dc #a33b2f #e07b28
    line 4 dark 47 2 47 74
    polygon a 52 4 52 66 94 66
    polygon c 52 47 80.5 47 87 55 52 55
    polygon a 42 14 42 66 12 66
    polygon b 0 72 100 72 84 94 16 94
    line 3 white 6 78 94 78
bottle front #36a04c #f3ead2 #c43c2c
    polygon a 42 12 58 12 58 30 70 46 70 100 30 100 30 46 42 30
    polygon c 40 0 60 0 60 13 40 13
    polygon b 30 56 70 56 70 84 30 84
    disc c 50 70 9 9
    line 3 white 48 17 48 28
bus side #f4b31f #2c4f8f
    polygon a 0 22 96 22 100 34 100 78 0 78
    polygon b 0 58 100 58 100 64 0 64
    polygon glass 5 30 20 30 20 50 5 50
    polygon glass 24 30 39 30 39 50 24 50
    polygon glass 43 30 58 30 58 50 43 50
    polygon glass 62 30 74 30 74 74 62 74
    polygon glass 80 30 95 30 98 38 98 52 80 52
    disc dark 22 78 10 10
    disc steel 22 78 4 4
    disc dark 86 78 9 9
    disc steel 86 78 4 4
car side #d8392b #ffd84a
    polygon a 0 70 3 55 22 50 36 33 68 33 82 50 97 55 100 70
    polygon glass 29 50 39 38 51 38 51 50
    polygon glass 55 38 66 38 75 50 55 50
    disc dark 22 71 12 12
    disc steel 22 71 5 5
    disc dark 78 71 12 12
    disc steel 78 71 5 5
    disc b 95 60 3.5 3.5
    line 2 dark 53 52 53 68
cat front #e8893a #b55b1c #6fae3c
    stroke 8 a 68 92 92 88 94 66 86 54
    curve a 50 42 68 58 78 92 66 100 34 100 22 92 32 58
    curve white 50 56 59 68 58 86 50 94 42 86 41 68
    polygon a 26 30 27 -2 48 14
    polygon a 74 30 73 -2 52 14
    polygon pink 31 20 31 6 41 14
    polygon pink 69 20 69 6 59 14
    disc a 50 28 25 20
    line 3 b 50 9 50 18
    line 3 b 42 11 43 18
    line 3 b 58 11 57 18
    disc c 40 26 5 6
    disc c 60 26 5 6
    disc dark 40 26 1.8 5
    disc dark 60 26 1.8 5
    polygon pink 46 35 54 35 50 40
    line 1 dark 18 34 38 38
    line 1 dark 18 42 38 40
    line 1 dark 82 34 62 38
    line 1 dark 82 42 62 40
    line 2 b 42 84 42 99
    line 2 b 58 84 58 99
chair front #8f5f35 #c98f56
    line 7 a 24 2 24 58
    line 7 a 76 2 76 58
    line 6 a 24 8 76 8
    line 5 a 24 24 76 24
    line 5 a 24 40 76 40
    line 6 a 30 66 30 88
    line 6 a 70 66 70 88
    line 7 a 18 66 18 100
    line 7 a 82 66 82 100
    polygon b 22 54 78 54 88 68 12 68
cow side #f3efe6 #2d2724 #c9a27a
    stroke 3 b 8 38 0 50 2 70
    polygon a 14 60 24 60 24 92 14 92
    polygon a 28 60 37 60 36 92 28 92
    polygon a 56 60 65 60 65 92 57 92
    polygon a 68 58 78 56 77 92 68 92
    disc pink 46 68 7 6
    curve a 6 36 30 30 64 30 80 34 78 60 60 68 26 66 8 62
    curve b 14 36 30 32 36 46 26 56 14 50
    curve b 50 32 66 32 66 50 52 52 46 42
    stroke 4 c 76 22 72 16 75 8
    stroke 4 c 88 22 93 16 91 8
    polygon b 73 24 62 26 72 32
    curve a 72 22 90 20 102 44 96 54 84 50 74 38
    disc pink 96 48 7 6
    disc dark 84 30 2.5 2.5
    line 5 dark 14 92 24 92
    line 5 dark 28 92 36 92
    line 5 dark 57 92 65 92
    line 5 dark 68 92 77 92
diningtable front #cf9350 #8e5a2a #d8433a
    polygon b 25 56 30 56 30 82 25 82
    polygon b 70 56 75 56 75 82 70 82
    polygon b 5 56 12 56 12 98 5 98
    polygon b 88 56 95 56 95 98 88 98
    polygon a 18 32 82 32 100 54 0 54
    polygon b 0 54 100 54 100 61 0 61
    disc white 27 46 12 5
    disc white 73 46 12 5
    polygon glass 45 22 55 22 53 44 47 44
    disc c 46 17 6 6
    disc c 55 16 6 6
dog side #a8713c #6a4020 #d33131
    stroke 7 a 18 50 6 40 2 22
    polygon a 16 58 26 58 25 98 16 98
    polygon b 28 58 36 58 34 98 27 98
    polygon b 56 58 63 58 62 98 55 98
    polygon a 64 56 74 54 73 98 64 98
    curve a 14 46 40 42 64 40 76 48 74 64 54 66 34 63 16 66
    curve a 58 50 62 26 74 16 86 20 102 30 102 40 86 44 78 58
    line 6 c 60 42 79 50
    curve b 64 20 74 17 78 30 72 46 64 42
    disc dark 101 31 4 3.5
    disc dark 84 26 2.5 2.5
    line 2 dark 90 39 101 38
horse side #7a4424 #2b1a12
    stroke 8 b 16 38 4 50 4 80
    line 7 b 30 54 34 76 30 100
    line 7 b 60 54 64 76 60 100
    line 7 a 20 52 18 76 20 100
    line 7 a 68 52 74 74 72 100
    curve a 12 40 26 34 48 38 66 34 76 46 68 60 44 58 20 58
    curve a 58 42 68 18 78 4 88 10 82 28 74 54
    polygon a 75 8 78 -6 84 6
    curve a 76 6 86 5 103 26 98 34 90 30 78 20
    stroke 7 b 78 2 67 14 58 36
    disc dark 86 14 2.3 2.3
motorbike side #7a3fc0 #23262e #ffd84a
    disc dark 18 72 18 18
    disc steel 18 72 9 9
    disc dark 82 72 18 18
    disc steel 82 72 9 9
    polygon steel 34 52 62 52 60 78 38 78
    line 5 steel 82 72 66 32
    line 6 steel 42 78 4 84
    stroke 7 a 60 66 70 52 84 48 100 58
    curve a 36 40 48 32 64 34 68 44 58 54 40 54
    curve b 2 42 18 38 42 42 40 52 22 54 8 50
    polygon glass 64 32 68 14 74 34
    line 4 dark 64 32 52 22
    disc c 74 38 6 7
person front #3d72cc #2d3350 #eab38e
    polygon b 37 56 63 56 66 96 54 96 50 68 46 96 34 96
    line 8 a 35 30 24 44 20 54
    line 8 a 65 30 76 44 80 54
    disc c 19 57 4.5 4.5
    disc c 81 57 4.5 4.5
    polygon a 31 25 69 25 64 60 36 60
    polygon c 46 20 54 20 54 27 46 27
    disc c 50 13 10 12
    curve dark 39 12 41 2 50 -2 59 2 61 12 50 6
    disc dark 46 14 1.3 1.3
    disc dark 54 14 1.3 1.3
    line 6 dark 32 98 46 98
    line 6 dark 54 98 68 98
pottedplant front #3fa344 #c8643a #2c7a38
    curve c 50 66 24 58 2 32 34 42
    curve c 50 66 76 58 98 32 66 42
    curve a 50 66 30 46 22 8 46 36
    curve a 50 66 70 46 78 8 54 36
    curve c 50 66 43 36 50 -2 57 36
    polygon b 27 66 73 66 66 100 34 100
    polygon b 22 60 78 60 78 71 22 71
sheep side #f2e9d4 #3c342f
    line 7 b 28 62 28 94
    line 7 b 38 62 38 94
    line 7 b 56 62 56 94
    line 7 b 66 62 66 94
    disc a 16 50 13 13
    disc a 26 38 14 14
    disc a 42 33 14 14
    disc a 58 34 14 14
    disc a 70 44 13 13
    disc a 68 58 13 13
    disc a 52 64 13 13
    disc a 36 64 13 13
    disc a 22 60 12 12
    curve a 14 50 30 32 60 32 76 50 60 68 30 68
    polygon b 76 30 66 34 76 38
    curve b 72 32 84 26 96 44 94 56 82 54 74 42
    disc white 84 37 3 3
sofa front #c23a86 #8e2560
    line 6 dark 8 84 8 94
    line 6 dark 92 84 92 94
    curve a 10 22 50 17 90 22 92 62 50 64 8 62
    polygon a 10 66 90 66 90 88 10 88
    polygon b 14 56 49 56 49 74 14 74
    polygon b 51 56 86 56 86 74 51 74
    curve a -2 46 8 38 17 46 16 88 -1 88
    curve a 102 46 92 38 83 46 84 88 101 88
train side #2f7d55 #b8322a #e8c24a
    polygon dark 72 12 84 12 81 36 75 36
    disc c 54 36 8 9
    polygon a 22 36 86 36 91 42 91 60 86 64 22 64
    line 2.5 c 42 36 42 63
    line 2.5 c 66 36 66 63
    polygon b 0 14 30 14 30 66 0 66
    polygon dark -4 8 34 8 34 15 -4 15
    polygon glass 7 22 23 22 23 40 7 40
    polygon dark -2 64 92 64 92 70 -2 70
    polygon b 88 64 104 90 84 90
    disc dark 14 79 11 11
    disc b 14 79 6 6
    disc dark 39 79 11 11
    disc b 39 79 6 6
    disc dark 64 79 11 11
    disc b 64 79 6 6
    line 4 steel 14 79 64 79
    disc c 92 46 4 4
tvmonitor front #2c2f37 #4cc6e6 #b9eef8
    polygon a 42 70 58 70 60 86 40 86
    polygon a 26 86 74 86 78 93 22 93
    polygon a 2 10 98 10 98 72 2 72
    polygon b 9 17 91 17 91 65 9 65
    polygon c 60 17 76 17 44 65 28 65
"""

_BIRD_COLOURS = (
    *("#24262b", "#f4f1e8", "#8b929b", "#d6322e", "#ee7f1f", "#f5cf2e", "#7d8430", "#3a9c48"),
    *("#1fa3a0", "#2f67d0", "#7746b8", "#6e4426", "#b35a2c", "#ea8fb0", "#e3cfa3"),
)

# Class 1 to 200 of CUB_200_2011; only the names are facts, the birds drawn under them are invented.
_BIRD_NAMES = """
Black_footed_Albatross Laysan_Albatross Sooty_Albatross Groove_billed_Ani Crested_Auklet Least_Auklet
Parakeet_Auklet Rhinoceros_Auklet Brewer_Blackbird Red_winged_Blackbird Rusty_Blackbird Yellow_headed_Blackbird
Bobolink Indigo_Bunting Lazuli_Bunting Painted_Bunting Cardinal Spotted_Catbird Gray_Catbird
Yellow_breasted_Chat Eastern_Towhee Chuck_will_Widow Brandt_Cormorant Red_faced_Cormorant Pelagic_Cormorant
Bronzed_Cowbird Shiny_Cowbird Brown_Creeper American_Crow Fish_Crow Black_billed_Cuckoo Mangrove_Cuckoo
Yellow_billed_Cuckoo Gray_crowned_Rosy_Finch Purple_Finch Northern_Flicker Acadian_Flycatcher
Great_Crested_Flycatcher Least_Flycatcher Olive_sided_Flycatcher Scissor_tailed_Flycatcher Vermilion_Flycatcher
Yellow_bellied_Flycatcher Frigatebird Northern_Fulmar Gadwall American_Goldfinch European_Goldfinch
Boat_tailed_Grackle Eared_Grebe Horned_Grebe Pied_billed_Grebe Western_Grebe Blue_Grosbeak Evening_Grosbeak
Pine_Grosbeak Rose_breasted_Grosbeak Pigeon_Guillemot California_Gull Glaucous_winged_Gull Heermann_Gull
Herring_Gull Ivory_Gull Ring_billed_Gull Slaty_backed_Gull Western_Gull Anna_Hummingbird
Ruby_throated_Hummingbird Rufous_Hummingbird Green_Violetear Long_tailed_Jaeger Pomarine_Jaeger Blue_Jay
Florida_Jay Green_Jay Dark_eyed_Junco Tropical_Kingbird Gray_Kingbird Belted_Kingfisher Green_Kingfisher
Pied_Kingfisher Ringed_Kingfisher White_breasted_Kingfisher Red_legged_Kittiwake Horned_Lark Pacific_Loon
Mallard Western_Meadowlark Hooded_Merganser Red_breasted_Merganser Mockingbird Nighthawk Clark_Nutcracker
White_breasted_Nuthatch Baltimore_Oriole Hooded_Oriole Orchard_Oriole Scott_Oriole Ovenbird Brown_Pelican
White_Pelican Western_Wood_Pewee Sayornis American_Pipit Whip_poor_Will Horned_Puffin Common_Raven
White_necked_Raven American_Redstart Geococcyx Loggerhead_Shrike Great_Grey_Shrike Baird_Sparrow
Black_throated_Sparrow Brewer_Sparrow Chipping_Sparrow Clay_colored_Sparrow House_Sparrow Field_Sparrow
Fox_Sparrow Grasshopper_Sparrow Harris_Sparrow Henslow_Sparrow Le_Conte_Sparrow Lincoln_Sparrow
Nelson_Sharp_tailed_Sparrow Savannah_Sparrow Seaside_Sparrow Song_Sparrow Tree_Sparrow Vesper_Sparrow
White_crowned_Sparrow White_throated_Sparrow Cape_Glossy_Starling Bank_Swallow Barn_Swallow Cliff_Swallow
Tree_Swallow Scarlet_Tanager Summer_Tanager Artic_Tern Black_Tern Caspian_Tern Common_Tern Elegant_Tern
Forsters_Tern Least_Tern Green_tailed_Towhee Brown_Thrasher Sage_Thrasher Black_capped_Vireo Blue_headed_Vireo
Philadelphia_Vireo Red_eyed_Vireo Warbling_Vireo White_eyed_Vireo Yellow_throated_Vireo Bay_breasted_Warbler
Black_and_white_Warbler Black_throated_Blue_Warbler Blue_winged_Warbler Canada_Warbler Cape_May_Warbler
Cerulean_Warbler Chestnut_sided_Warbler Golden_winged_Warbler Hooded_Warbler Kentucky_Warbler Magnolia_Warbler
Mourning_Warbler Myrtle_Warbler Nashville_Warbler Orange_crowned_Warbler Palm_Warbler Pine_Warbler
Prairie_Warbler Prothonotary_Warbler Swainson_Warbler Tennessee_Warbler Wilson_Warbler Worm_eating_Warbler
Yellow_Warbler Northern_Waterthrush Louisiana_Waterthrush Bohemian_Waxwing Cedar_Waxwing
American_Three_toed_Woodpecker Pileated_Woodpecker Red_bellied_Woodpecker Red_cockaded_Woodpecker
Red_headed_Woodpecker Downy_Woodpecker Bewick_Wren Cactus_Wren Carolina_Wren House_Wren Marsh_Wren Rock_Wren
Winter_Wren Common_Yellowthroat
"""
_BIRDS = _BIRD_NAMES.split()


class _Part(NamedTuple):
    kind: str
    colour: str
    numbers: list[float]


class _Silhouette(NamedTuple):
    view: str
    colours: dict[str, str]
    parts: list[_Part]


class _Picture(NamedTuple):
    """What is decided about a VOC image before it is drawn."""

    folder: str
    split: str
    image_id: str
    seed: tuple[int, ...]
    classes: list[str]
    extra: str | None  # class of an additional, difficult object
    fractional: bool  # box corners with decimals


class _Bird(NamedTuple):
    """A row of the index files of CUB-200-2011."""

    path: str
    label: int
    is_train: int
    box: tuple[int, int, int, int]


class _Object(NamedTuple):
    """One drawn object; `box` is xmin, ymin, xmax, ymax in pixels from 1, both ends included."""

    name: str
    pose: str
    truncated: bool
    difficult: bool
    occluded: bool
    box: tuple[float, float, float, float]


def _read_silhouettes(text: str) -> dict[str, _Silhouette]:
    silhouettes = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            name, view, *colours = line.split()
            silhouettes[name] = _Silhouette(view, _COLOURS | dict(zip("abc", colours, strict=False)), [])
        else:
            kind, *rest = line.split()
            index = 1 if kind in ("line", "stroke", "ring") else 0
            colour = rest.pop(index)
            silhouettes[name].parts.append(_Part(kind, colour, [float(number) for number in rest]))
    return silhouettes


_VOC = _read_silhouettes(_SILHOUETTES)


def _smooth(points: np.ndarray, closed: bool) -> np.ndarray:
    """Catmull-Rom spline through the points (N, 2), eight steps a segment."""
    padded = np.concatenate([points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]])
    t = np.linspace(0, 1, 8, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, 2), points[:0] if closed else points[-1:]])


def _outline(part: _Part) -> tuple[np.ndarray, float, bool]:
    """Points (N, 2) in units, stroke width (0: filled), and whether the outline is closed."""
    numbers = part.numbers
    width = numbers[0] if part.kind in ("line", "stroke", "ring") else 0.0
    points = np.array(numbers[1:] if width else numbers).reshape(-1, 2)
    match part.kind:
        case "disc" | "ring":
            angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)[:, None]
            points = points[0] + points[1] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        case "curve" | "stroke":
            points = _smooth(points, closed=part.kind == "curve")
    return points, width, part.kind not in ("line", "stroke")


def _jitter(colour: str, hue: float, saturation: float, value: float) -> tuple[float, ...]:
    """Shifts #rrggbb in HSV; returns blue, green, red from 0 to 255."""
    h, s, v = colorsys.rgb_to_hsv(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    rgb = colorsys.hsv_to_rgb((h + hue) % 1, min(1.0, s * saturation), min(1.0, v * value))
    return tuple(255 * channel for channel in reversed(rgb))


class _Sprite:
    """A posed and coloured silhouette that can be rendered at any size."""

    def __init__(
        self, rng: np.random.Generator, parts: list[_Part], colours: dict[str, str], tilt: float, hue: float
    ) -> None:
        shift = rng.uniform(-hue, hue), rng.uniform(0.8, 1.15), rng.uniform(0.85, 1.1)
        self.colours = {name: _jitter(colour, *shift) for name, colour in colours.items()}
        self.mirrored = bool(rng.random() < 0.5)
        self.light = rng.uniform(0.04, 0.16)
        angle = np.deg2rad(rng.uniform(-tilt, tilt))
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        stretch = np.exp(rng.uniform(-0.12, 0.12))
        pose = rotation @ np.diag([-stretch if self.mirrored else stretch, 1 / stretch]) / 100
        self.outlines = []
        for part in parts:
            points, width, closed = _outline(part)
            self.outlines.append((points @ pose.T, width / 100, closed, self.colours[part.colour]))
        low = np.min([(points - width / 2).min(axis=0) for points, width, _, _ in self.outlines], axis=0)
        high = np.max([(points + width / 2).max(axis=0) for points, width, _, _ in self.outlines], axis=0)
        self.origin, self.extent = low, high - low

    def render(self, length: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the colour (H, W, 3), multiplied by the coverage, and the coverage (H, W, 1) from 0 to 1."""
        scale = _SUPERSAMPLING * length / self.extent.max()
        edge = max(2, round(0.012 * length * _SUPERSAMPLING))
        width, height = (np.ceil(self.extent * scale / _SUPERSAMPLING).astype(int) + 4) * _SUPERSAMPLING
        colour = np.zeros((height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for outline, stroke, closed, fill in self.outlines:
            points = [np.rint((outline - self.origin) * scale + 2 * _SUPERSAMPLING).astype(np.int32)]
            rim = tuple(0.45 * channel for channel in fill)
            if stroke:
                thickness = max(1, round(stroke * scale))
                layers = [(rim, thickness + edge), (fill, thickness)]
            else:
                cv2.fillPoly(colour, points, fill)
                cv2.fillPoly(mask, points, 255)
                layers = [(rim, edge)]
            for ink, thickness in layers:
                cv2.polylines(colour, points, closed, ink, thickness)
                cv2.polylines(mask, points, closed, 255, thickness)
        size = (int(width) // _SUPERSAMPLING, int(height) // _SUPERSAMPLING)
        shade = np.linspace(1 + self.light, 1 - self.light, size[1], dtype=np.float32)[:, None, None]
        coverage = cv2.resize(mask, size, interpolation=cv2.INTER_AREA).astype(np.float32)[..., None] / 255
        return cv2.resize(colour, size, interpolation=cv2.INTER_AREA) * shade, coverage


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A pale gradient with one of several textures and a few distracting blobs and lines: (H, W, 3) float32."""

    def pale() -> np.ndarray:
        colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.5, 0.95))
        return 255 * np.array(colour, np.float32)

    first, second, third = pale(), pale(), pale()
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * x + np.sin(angle) * y
    ramp = ((slope - slope.min()) / np.ptp(slope))[..., None]
    image = first + (second - first) * ramp
    match rng.integers(5):
        case 0:  # clouds
            coarse = rng.random((rng.integers(3, 9), rng.integers(3, 9)), np.float32)
            cloud = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
            image += 0.8 * (third - image) * np.clip(cloud, 0, 1)
        case 1:  # stripes
            waves = np.sin(slope * rng.uniform(25, 70))[..., None] > rng.uniform(-0.5, 0.8)
            image += 0.35 * (third - image) * waves
        case 2:  # ground below a horizon
            horizon = rng.uniform(0.35, 0.75) * height / max(height, width)
            image[y > horizon + rng.uniform(-0.1, 0.1) * x] = third
        case 3:  # grain
            grain = cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), rng.uniform(0.8, 2.5))
            image += 14 * (grain / grain.std())[..., None]
    image = np.ascontiguousarray(image)
    for _ in range(rng.integers(0, 6)):
        layer = image.copy()
        centre = tuple(int(value) for value in rng.integers(0, (width, height)))
        ink = tuple(float(channel) for channel in pale())
        if rng.random() < 0.5:
            axes = tuple(int(value) for value in rng.integers(4, max(height, width) // 6, 2))
            cv2.ellipse(layer, centre, axes, rng.uniform(0, 180), 0, 360, ink, -1, cv2.LINE_AA)
        else:
            end = tuple(int(value) for value in rng.integers(0, (width, height)))
            cv2.line(layer, centre, end, ink, int(rng.integers(1, 5)), cv2.LINE_AA)
        image += rng.uniform(0.3, 0.8) * (layer - image)
    return image


def _overlaps(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two boxes (x, y, width, height) share more than 12 % of the smaller one."""
    shared = [min(first[i] + first[i + 2], second[i] + second[i + 2]) - max(first[i], second[i]) for i in (0, 1)]
    return min(shared) > 0 and shared[0] * shared[1] > 0.12 * min(first[2] * first[3], second[2] * second[3])


def _place(
    rng: np.random.Generator, canvas: tuple[int, int], size: tuple[int, int], truncated: bool, taken: list
) -> tuple[int, int] | None:
    """Looks for the left upper corner of an object of `size` on `canvas` (both width, height) beside those `taken`."""
    for _ in range(40):
        corner = [int(rng.integers(0, max(1, canvas[i] - size[i] + 1))) for i in (0, 1)]
        if truncated:
            axis, hidden = rng.integers(2), rng.uniform(0.15, 0.35)
            low_side = rng.random() < 0.5
            corner[axis] = round(-hidden * size[axis] if low_side else canvas[axis] - (1 - hidden) * size[axis])
        inside = all(corner[i] >= 0 and corner[i] + size[i] <= canvas[i] for i in (0, 1))
        if inside != truncated and not any(_overlaps((*corner, *size), other) for other in taken):
            return tuple(corner)
    return None


def _paste(
    image: np.ndarray, owner: np.ndarray, sprite: _Sprite, length: float, corner: tuple[int, int], opacity: float
) -> int:
    """Lays a sprite on the image, clipped to it, and enters it in `owner` (H, W), the object seen at each pixel.

    Returns the number of pixels it covers.
    """
    colour, coverage = sprite.render(length)
    left, top = max(0, -corner[0]), max(0, -corner[1])
    x, y = max(0, corner[0]), max(0, corner[1])
    inside = np.s_[top : top + image.shape[0] - y, left : left + image.shape[1] - x]
    colour, coverage = colour[inside], coverage[inside]
    region = np.s_[y : y + coverage.shape[0], x : x + coverage.shape[1]]
    image[region] += opacity * (colour - coverage * image[region])
    covered = coverage[..., 0] > 0.5
    owner[region][covered] = owner.max() + 1
    return int(covered.sum())


def _develop(rng: np.random.Generator, image: np.ndarray) -> bytes:
    """Exposes the finished picture: brightness, cast and sensor noise; returns it as JPEG."""
    exposure = rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
    image = image * exposure.astype(np.float32) + 3 * rng.standard_normal(image.shape, np.float32)
    return cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def _extent(seen: np.ndarray) -> tuple[int, int, int, int]:
    """Pixel bounds from 1, both ends included, of a mask (H, W) that is true somewhere."""
    rows, columns = np.flatnonzero(seen.any(axis=1)) + 1, np.flatnonzero(seen.any(axis=0)) + 1
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _draw_voc(picture: _Picture) -> tuple[bytes, list[_Object], tuple[int, int]]:
    """Returns the JPEG, its objects, and width and height."""
    rng = np.random.default_rng(picture.seed)
    canvas = (int(rng.integers(200, 257)), int(rng.integers(145, 195)))
    if rng.random() < 0.3:
        canvas = canvas[::-1]
    image = _background(rng, canvas[1], canvas[0])
    owner = np.full(image.shape[:2], -1)
    taken, drawn = [], []
    for name in [*picture.classes, *([picture.extra] if picture.extra else [])]:
        difficult = len(drawn) == len(picture.classes)
        sprite = _Sprite(rng, _VOC[name].parts, _VOC[name].colours, tilt=12, hue=0.03)
        truncated = bool(rng.random() < 0.08) and not difficult
        faded = difficult and rng.random() < 0.4
        tiny = difficult and not faded
        length = rng.uniform(18, 28) if tiny else rng.uniform(*_SHARES[len(picture.classes)]) * max(canvas)
        while True:
            size = tuple(int(side) for side in np.ceil(sprite.extent * length / sprite.extent.max()) + 4)
            corner = _place(rng, canvas, size, truncated, taken)
            if corner:
                break
            length *= 0.93
        taken.append((*corner, *size))
        area = _paste(image, owner, sprite, length, corner, opacity=rng.uniform(0.25, 0.35) if faded else 1.0)
        drawn.append((name, sprite.mirrored, truncated, difficult, area))
    objects = []
    for index, (name, mirrored, truncated, difficult, area) in enumerate(drawn):
        seen = owner == index
        occluded = int(seen.sum()) < area
        box = _extent(seen)
        if picture.fractional:
            box = (box[0] + 0.3, box[1] + 0.3, box[2] - 0.3, box[3] - 0.3)
        pose = "Frontal" if _VOC[name].view == "front" else "Left" if mirrored else "Right"
        objects.append(_Object(name, pose, truncated, difficult, occluded, box))
    return _develop(rng, image), objects, canvas


def _plan_voc(seed: int) -> list[_Picture]:
    """Deals ids and classes to the images so that every split holds each class about equally often."""
    rng = np.random.default_rng((seed, 2))
    ids = {
        "VOC2007": [f"{number:06d}" for number in rng.choice(np.arange(1, 9964), 260, replace=False)],
        "VOC2012": [f"{2008 + i % 4}_{number:06d}" for i, number in enumerate(rng.choice(6000, 160, replace=False))],
    }
    pictures = []
    for folder, split, count, empty in (
        ("VOC2007", "train", 80, 1),
        ("VOC2007", "val", 80, 1),
        ("VOC2007", "test", 100, 2),
        ("VOC2012", "train", 80, 2),
        ("VOC2012", "val", 80, 2),
    ):
        sizes = [0] * empty + [(1, 2, 3, 3, 3, 4, 4, 4)[i % 8] for i in range(count - empty)]
        deck = np.concatenate([rng.permutation(list(_VOC)) for _ in range(1 + sum(sizes) // len(_VOC))]).tolist()
        for position, size in enumerate(rng.permutation(sizes)):
            picture = _Picture(
                folder,
                split,
                image_id=ids[folder].pop(),
                seed=(seed, int(folder[3:]), len(pictures)),
                classes=[deck.pop() for _ in range(size)],
                extra=str(rng.choice(list(_VOC))) if size and position % 6 == 0 else None,
                fractional=False,
            )
            pictures.append(picture)
    # The official VOC2012 has decimals in one file too (2011_003353), which breaks every reader that expects integers.
    last = max(i for i, picture in enumerate(pictures) if picture.split == "train" and picture.classes)
    pictures[last] = pictures[last]._replace(fractional=True)
    return pictures


def _annotation(picture: _Picture, objects: list[_Object], canvas: tuple[int, int]) -> str:
    """The XML of an image with VOC's tags, in the order that its year has them."""
    year = picture.folder if picture.folder == "VOC2007" else f"VOC{picture.image_id[:4]}"
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder=picture.folder, filename=f"{picture.image_id}.jpg")
    source = ElementTree.SubElement(root, "source")
    add(source, database=f"The {year} Database", annotation=f"PASCAL {year}", image="drawn")
    add(ElementTree.SubElement(root, "size"), width=canvas[0], height=canvas[1], depth=3)
    add(root, segmented=0)
    for item in objects:
        node = ElementTree.SubElement(root, "object")
        add(node, name=item.name, pose=item.pose, truncated=int(item.truncated))
        if picture.folder == "VOC2007":
            add(node, difficult=int(item.difficult))
        else:
            add(node, occluded=int(item.occluded))
        box = ElementTree.SubElement(node, "bndbox")
        add(box, **dict(zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True)))
        if picture.folder != "VOC2007":
            add(node, difficult=int(item.difficult))
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _write_voc(root: Path, picture: _Picture) -> None:
    jpeg, objects, canvas = _draw_voc(picture)
    folder = root / picture.folder
    (folder / "JPEGImages" / f"{picture.image_id}.jpg").write_bytes(jpeg)
    (folder / "Annotations" / f"{picture.image_id}.xml").write_text(_annotation(picture, objects, canvas))


def _write_voc_lists(root: Path, pictures: list[_Picture]) -> None:
    """ImageSets/Main: the ids of each split, and for each class 1 (present), 0 (only difficult) or -1 (absent)."""
    for folder, split in [(folder, split) for folder in ("VOC2007", "VOC2012") for split in _SPLITS]:
        chosen = [p for p in pictures if p.folder == folder and p.split in _SPLITS[split]]
        if not chosen:  # VOC2012's test set is not public
            continue
        chosen.sort(key=lambda picture: picture.image_id)
        lists = root / folder / "ImageSets" / "Main"
        (lists / f"{split}.txt").write_text("".join(f"{p.image_id}\n" for p in chosen))
        for name in _VOC:
            flags = [1 if name in p.classes else 0 if name == p.extra else -1 for p in chosen]
            lines = [f"{p.image_id} {flag:2d}\n" for p, flag in zip(chosen, flags, strict=True)]
            (lists / f"{name}_{split}.txt").write_text("".join(lines))


def _bird(seed: int, label: int) -> tuple[list[_Part], dict[str, str]]:
    """The look of bird `label` (from 0) in the world of `seed`; no two share the colours of both body and wing."""
    pairs = np.random.default_rng((seed, 3)).permutation(list(permutations(_BIRD_COLOURS, 2)))
    rng = np.random.default_rng((seed, 4, label))
    body, wing = (str(colour) for colour in pairs[label])

    def either(colour: str, chance: float) -> str:
        return colour if rng.random() < chance else str(rng.choice(_BIRD_COLOURS))

    colours = _COLOURS | {
        "body": body,
        "wing": wing,
        "head": either(body, 0.4),
        "tail": either(wing, 0.5),
        "belly": either(body, 0.3),
        "mark": either(wing, 0.1),
        "beak": str(rng.choice(["#24262b", "#f5cf2e", "#ee7f1f", "#d6322e", "#8b929b"])),
    }
    plump, radius, neck = rng.uniform(0.8, 1.3), rng.uniform(10, 14), rng.uniform(0, 14)
    leg, beak, thick, hook = rng.uniform(4, 22), rng.uniform(6, 28), rng.uniform(2.5, 6), rng.uniform(-2, 6)
    tail, drop, fan = rng.uniform(14, 40), rng.uniform(-14, 18), rng.uniform(4, 10)
    x, y = 68 + neck / 4, 34 - neck
    end, ground, chin = 22 - tail, 70 + 10 * plump + leg, 58 + 18 * plump
    tails = [
        [24, 54, end, 62 + drop - fan, end, 62 + drop + fan, 28, 70],
        [24, 54, end, 60 + drop - 1.6 * fan, end + 0.5 * tail, 62 + drop, end, 64 + drop + 1.6 * fan, 28, 70],
        [24, 54, end, 62 + drop, 28, 70],
        [24, 54, end + 0.3 * tail, 62 + drop - 2 * fan, end, 62 + drop, end + 0.3 * tail, 62 + drop + 2 * fan, 28, 70],
    ]
    parts = [
        ("line", "beak", [3, 44, 66, 42, ground, 52, ground]),
        ("line", "beak", [3, 54, 66, 53, ground, 63, ground]),
        ("polygon", "tail", tails[rng.integers(len(tails))]),
        ("stroke", "head", [1.5 * radius, 56, 52, x, y]),
        ("curve", "body", [16, 62, 34, 62 - 18 * plump, 56, 56 - 14 * plump, 72, 48, 68, 66, 50, chin, 30, chin - 6]),
        ("curve", "belly", [70, 50, 67, 66, 50, chin - 1, 34, chin - 5, 46, 64]),
        ("curve", "wing", [12, 66, 32, 60 - 12 * plump, 52, 48, 60, 58, 42, 70]),
    ]
    for bar in range(rng.integers(0, 3)):
        parts.append(("line", "mark", [3, 40 - 12 * bar, 52, 44 - 12 * bar, 68 - bar]))
    for streak in range(rng.integers(0, 4)):
        parts.append(("line", "mark", [2, 66 - 7 * streak, 60 + 4 * streak, 64 - 7 * streak, 67 + 4 * streak]))
    if rng.random() < 0.3:
        parts.append(("polygon", "mark", [x, y - radius, x - 2.2 * radius, y - 1.7 * radius, x - radius, y]))
    parts.append(("disc", "head", [x, y, radius, radius]))
    if rng.random() < 0.5:
        crown = [x - radius, y - 2, x - 0.6 * radius, y - radius, x + 0.5 * radius, y - radius, x + radius, y - 4]
        parts.append(("curve", "mark", crown))
    if rng.random() < 0.35:
        parts.append(("line", "mark", [5, x - radius, y, x + radius, y]))
    if rng.random() < 0.35:
        parts.append(("disc", "mark", [x + 1, y + 0.8 * radius, 0.7 * radius, 0.5 * radius]))
    tip = x + radius + beak
    parts += [
        ("polygon", "beak", [x + 0.8 * radius, y - thick, tip, y + hook, x + 0.8 * radius, y + thick]),
        ("disc", "white", [x + 0.3 * radius, y - 0.15 * radius, 4, 4]),
        ("disc", "dark", [x + 0.3 * radius, y - 0.15 * radius, 2.5, 2.5]),
    ]
    return [_Part(*part) for part in parts], colours


def _draw_bird(seed: int, label: int, number: int) -> tuple[bytes, tuple[int, int, int, int]]:
    """Returns picture `number` of class `label` (from 0) as JPEG, and its box x, y, width, height (pixels from 0)."""
    rng = np.random.default_rng((seed, 2011, label, number))
    canvas = rng.integers(96, 113, 2)
    image = _background(rng, int(canvas[1]), int(canvas[0]))
    owner = np.full(image.shape[:2], -1)
    sprite = _Sprite(rng, *_bird(seed, label), tilt=15, hue=0.015)
    length = rng.uniform(0.75, 0.98) * ((canvas - 5) / sprite.extent).min() * sprite.extent.max()
    size = tuple(int(side) for side in np.ceil(sprite.extent * length / sprite.extent.max()) + 4)
    corner = tuple(int(rng.integers(0, canvas[i] - size[i] + 1)) for i in (0, 1))
    _paste(image, owner, sprite, length, corner, opacity=1.0)
    left, top, right, bottom = _extent(owner == 0)
    return _develop(rng, image), (left - 1, top - 1, right - left + 1, bottom - top + 1)


def _write_birds(root: Path, seed: int, label: int) -> list[_Bird]:
    """Draws the pictures of one class."""
    folder = f"{label + 1:03d}.{_BIRDS[label]}"
    stem = "_".join(word[0].upper() + word[1:] for word in _BIRDS[label].split("_"))
    trained = np.random.default_rng((seed, 5, label)).permutation(_BIRD_PICTURES) < _TRAIN_PICTURES
    birds = []
    for number, is_train in enumerate(trained):
        path = f"{folder}/{stem}_{number + 1:04d}_{1000 * (label + 1) + number}.jpg"
        jpeg, box = _draw_bird(seed, label, number)
        (root / "CUB_200_2011" / "images" / path).write_bytes(jpeg)
        birds.append(_Bird(path, label + 1, int(is_train), box))
    return birds


def _write_bird_lists(root: Path, birds: list[_Bird]) -> None:
    """The index files of CUB-200-2011: one line an image or a class, numbered from 1; boxes are x y width height."""
    columns = {
        "classes": [f"{label:03d}.{name}" for label, name in enumerate(_BIRDS, 1)],
        "images": [bird.path for bird in birds],
        "image_class_labels": [bird.label for bird in birds],
        "train_test_split": [bird.is_train for bird in birds],
        "bounding_boxes": ["{:.1f} {:.1f} {:.1f} {:.1f}".format(*bird.box) for bird in birds],
    }
    for name, values in columns.items():
        lines = [f"{number} {value}\n" for number, value in enumerate(values, 1)]
        (root / "CUB_200_2011" / f"{name}.txt").write_text("".join(lines))


def _mark(seed: int) -> str:
    return json.dumps({"seed": seed, "format": _FORMAT}) + "\n"


def _draw(root: Path, seed: int) -> None:
    """Draws everything into the empty folder `root`; the marker comes last."""
    for folder in ("VOC2007", "VOC2012"):
        for child in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder / child).mkdir(parents=True)
    for label, name in enumerate(_BIRDS, 1):
        (root / "CUB_200_2011" / "images" / f"{label:03d}.{name}").mkdir(parents=True)
    pictures = _plan_voc(seed)
    _write_voc_lists(root, pictures)
    birds = []
    total = len(pictures) + _BIRD_PICTURES * len(_BIRDS)
    with tqdm(total=total, desc=f"drawing the sample (seed {seed})", unit="image", disable=None) as progress:
        for picture in pictures:
            _write_voc(root, picture)
            progress.update()
        for label in range(len(_BIRDS)):
            birds += _write_birds(root, seed, label)
            progress.update(_BIRD_PICTURES)
    _write_bird_lists(root, birds)
    (root / _MARKER).write_text(_mark(seed))


def draw_sample(root: Path, seed: int = 0) -> None:
    """Draws the sample under `root`, unless it is there already with this seed.

    The drawing happens in a temporary folder beside `root` that is renamed at the end, so what lies under `root` is
    always a complete sample. A sample of another seed is replaced, any other folder is left alone.

    Args:
        root: Data root to create; receives VOC2007/, VOC2012/ and CUB_200_2011/.
        seed: Not negative. Decides everything: for one seed the files are identical to the byte. The 200 birds of
            another seed look different, so it serves for pretraining without having seen the classes.

    Raises:
        UserError: If `root` holds something else or cannot be written, or the seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed {seed}: expected 0 or more; choose another seed")
    marker = root / _MARKER
    try:
        if marker.is_file() and marker.read_text() == _mark(seed):
            return
        if root.exists() and not marker.is_file() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root}: found something else than a drawn sample; remove it or choose another root")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            fresh = Path(folder) / "fresh"
            _draw(fresh, seed)
            if root.exists():
                root.rename(Path(folder) / "old")
            fresh.rename(root)
    except OSError as error:
        raise UserError(f"{root}: cannot draw the sample there ({error}); free space or choose another root") from error


def sample_seed(root: Path) -> int | None:
    """The seed of the drawn sample in `root`; None where other data lies."""
    try:
        return json.loads((root / _MARKER).read_text())["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@exits_on_user_error
def main() -> None:
    """Command line: draws the sample and tells what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("datasets/sample"), help="folder to draw into (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample (%(default)s)")
    args = parser.parse_args()
    draw_sample(args.root, args.seed)
    print(f"{args.root}: drawn from seed {args.seed}")
    for name, pattern in (("VOC2007", "JPEGImages/*"), ("VOC2012", "JPEGImages/*"), ("CUB_200_2011", "images/*/*")):
        print(f"  {name:<12} {len(list((args.root / name).glob(pattern))):5d} images")


if __name__ == "__main__":
    main()
