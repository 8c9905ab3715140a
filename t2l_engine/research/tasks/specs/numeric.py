"""Families on numbers, lists of numbers and quantities."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import number, numbers, numbers_list, one_number, put
from t2l_engine.research.tasks.specs.words import POOLS, ordinal

GROUPS = {"a comma": ",", "a space": " ", "a full stop": ".", "an apostrophe": "'", "an underscore": "_", "a hyphen": "-"}
CONVERSIONS = {
    ("weeks", "days"): 7, ("years", "months"): 12, ("hours", "minutes"): 60, ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000, ("euros", "cents"): 100, ("kilograms", "grams"): 1000, ("decades", "years"): 10,
    ("centuries", "years"): 100, ("centimetres", "millimetres"): 10, ("litres", "millilitres"): 1000, ("pairs", "pieces"): 2,
    ("tonnes", "kilograms"): 1000, ("seconds", "milliseconds"): 1000, ("yards", "feet"): 3, ("millennia", "years"): 1000,
}  # fmt: skip

FAMILIES = (
    Family(
        "add",
        "number",
        {"n": (1, 2, 3, 4, 5, 10, 20, 50, 100), "what": ("plus", "minus")},
        make=lambda p, draw: one_number(draw, 100, 899),
        answer=lambda p, text: str(number(text) + (p.n if p.what == "plus" else -p.n)),
    ),
    Family(
        "unit",
        "number",
        {"unit": POOLS["units"]},
        make=lambda p, draw: one_number(draw, 2, 999),
        answer=lambda p, text: f"{number(text)}{p.unit}",
    ),
    Family(
        "sign",
        "number",
        {"sign": POOLS["signs"]},
        make=lambda p, draw: one_number(draw, 2, 999),
        answer=lambda p, text: f"{p.sign}{number(text)}",
    ),
    Family(
        "pad",
        "number",
        {"width": (4, 5, 6, 7, 8), "fill": tuple("0*#.-_x")},
        make=lambda p, draw: one_number(draw, 1, 999),
        answer=lambda p, text: str(number(text)).rjust(p.width, p.fill),
    ),
    Family(
        "thousands",
        "number",
        {"mark": tuple(GROUPS)},
        make=lambda p, draw: one_number(draw, 1000, 9_999_999),
        answer=lambda p, text: f"{number(text):,}".replace(",", GROUPS[p.mark]),
    ),
    Family(
        "times",
        "number",
        {"n": (2, 3, 5, 10, 100, 1000)},
        make=lambda p, draw: one_number(draw, 2, 99),
        answer=lambda p, text: str(number(text) * p.n),
    ),
    Family(
        "ordinal",
        "number",
        {"thing": POOLS["counted"]},
        make=lambda p, draw: one_number(draw, 1, 400),
        answer=lambda p, text: f"the {ordinal(number(text))} {p.thing}",
    ),
    Family(
        "sequence",
        "number",
        {"count": (2, 3, 4), "step": (1, 2, 5, 10, 100)},
        make=lambda p, draw: one_number(draw, 10, 800),
        answer=lambda p, text: ", ".join(str(number(text) + p.step * i) for i in range(1, p.count + 1)),
    ),
    Family(
        "extreme",
        "numbers",
        {"which": ("largest", "smallest", "second largest", "second smallest")},
        make=lambda p, draw: numbers_list(draw, 1, 99, 4),
        answer=lambda p, text: str(extreme(numbers(text), p.which)),
    ),
    Family(
        "filter_numbers",
        "numbers",
        {"what": ("more than", "less than"), "limit": (15, 20, 25, 30, 40, 50, 60, 70, 75, 80, 85)},
        make=lambda p, draw: numbers_list(draw, 1, 99, 5),
        answer=lambda p, text: put(
            [str(n) for n in numbers(text) if (n > p.limit if p.what == "more than" else n < p.limit)]
        ),
    ),
    Family(
        "count_numbers",
        "numbers",
        {"what": ("more than", "less than"), "limit": (20, 30, 40, 50, 60, 70, 80)},
        make=lambda p, draw: numbers_list(draw, 1, 99, 5),
        answer=lambda p, text: str(sum((n > p.limit if p.what == "more than" else n < p.limit) for n in numbers(text))),
    ),
    Family(
        "convert",
        "quantity",
        {"units": tuple(CONVERSIONS)},
        make=lambda p, draw: draw.layout(("{} {}", "{} {} in all"), ("exactly {} {}", "a total of {} {}")).format(
            draw.number(2, 99), p.units[0]
        ),
        answer=lambda p, text: f"{number(text) * CONVERSIONS[p.units]} {p.units[1]}",
    ),
)


def extreme(values, which):
    ordered = sorted(values, reverse=which.endswith("largest"))
    return ordered[min(which.startswith("second"), len(ordered) - 1)]
