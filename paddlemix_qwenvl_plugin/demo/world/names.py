"""Shapes, colours, sizes, places and words of the demo world, with English (`en`) and Chinese (`zh`) names.

The demo model is trained on them (tools/train_demo): a change requires a new training.
"""

from __future__ import annotations

LANGUAGES = ("en", "zh")

SHAPES: dict[str, dict[str, str]] = {
    "circle": {"en": "circle", "zh": "圆形"},
    "square": {"en": "square", "zh": "正方形"},
    "triangle": {"en": "triangle", "zh": "三角形"},
    "star": {"en": "star", "zh": "星形"},
    "diamond": {"en": "diamond", "zh": "菱形"},
    "cross": {"en": "cross", "zh": "十字形"},
    "heart": {"en": "heart", "zh": "心形"},
}

COLOURS: dict[str, dict[str, str]] = {
    "red": {"en": "red", "zh": "红色"},
    "orange": {"en": "orange", "zh": "橙色"},
    "yellow": {"en": "yellow", "zh": "黄色"},
    "green": {"en": "green", "zh": "绿色"},
    "blue": {"en": "blue", "zh": "蓝色"},
    "purple": {"en": "purple", "zh": "紫色"},
    "brown": {"en": "brown", "zh": "棕色"},
    "black": {"en": "black", "zh": "黑色"},
}

RGB: dict[str, tuple[int, int, int]] = {
    "red": (216, 36, 44),
    "orange": (246, 134, 28),
    "yellow": (246, 208, 24),
    "green": (36, 150, 66),
    "blue": (38, 88, 214),
    "purple": (132, 54, 172),
    "brown": (122, 74, 38),
    "black": (24, 24, 28),
}

TEXT_COLOURS = ("black", "blue", "red", "green", "purple", "brown")
"""Text colours: those with enough contrast on the pale backgrounds."""

BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (255, 255, 255),
    (250, 246, 236),
    (236, 238, 240),
    (224, 234, 246),
    (226, 242, 228),
    (248, 232, 236),
    (236, 230, 246),
    (214, 216, 220),
)

SIZES: dict[str, dict[str, str]] = {
    "small": {"en": "small", "zh": "小的"},
    "large": {"en": "large", "zh": "大的"},
}

# In reading order: the cells of a 3 x 3 grid.
PLACES: tuple[dict[str, str], ...] = (
    {"en": "at the top left", "zh": "左上角"},
    {"en": "at the top", "zh": "上方"},
    {"en": "at the top right", "zh": "右上角"},
    {"en": "on the left", "zh": "左侧"},
    {"en": "in the centre", "zh": "中央"},
    {"en": "on the right", "zh": "右侧"},
    {"en": "at the bottom left", "zh": "左下角"},
    {"en": "at the bottom", "zh": "下方"},
    {"en": "at the bottom right", "zh": "右下角"},
)

_WORD_LIST = """
AIR ANT APPLE ARM ART BAG BALL BANK BEAR BED BEE BELL BIG BIKE BIRD BLUE BOAT BOOK BOX BOY BREAD BUS
CAKE CAP CAR CAT CITY CLOCK CLUB COLD COW CUP DAY DEER DOG DOOR DUCK EAR EAST EGG EXIT EYE FARM FAST
FIRE FISH FLY FOOD FOX FREE FROG FRUIT GAME GATE GIFT GIRL GOAT GOLD GREEN GYM HAND HAT HELLO HELP
HILL HOME HORSE HOT HOTEL HOUSE ICE INN IRON JAM JAZZ JOB KEY KING KITE LAKE LAMP LEAF LEFT LION
LOVE MAP MARS MEAT MENU MILK MOON MOUSE MUSIC NEW NEST NIGHT NORTH NUT OAK OPEN OWL OX PARK PEN
PIANO PIG PIZZA PLUM PORT QUEEN QUIZ RADIO RAIN RED RICE RING ROAD ROSE SALE SALT SEA SHIP SHOE SHOP
SKY SNOW SODA SOUP SOUTH STAR STOP SUN SWIM TAXI TEA TIGER TOWN TOY TRAIN TREE TWO UNCLE VAN VASE
WATER WEST WIND WOLF WOOD YES YOGA ZEBRA ZERO ZOO
"""

WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
"""Words as on signs, 2 to 5 letters."""
