"""A small suite of generated tasks, so that training and its tests need no external data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.research.tasks.draw import Draw
from t2l_engine.research.tasks.examples import split
from t2l_engine.research.tasks.folder import Example, Task
from t2l_engine.research.tasks.specs.english import past, plural

MIN_EXAMPLES, MAX_EXAMPLES = 20, 120

ANIMALS = """
ant badger bat bear beaver bee bird camel cat cow crab crocodile crow dog dolphin donkey duck eagle elephant falcon
ferret frog giraffe goat gorilla hamster hawk hen horse jaguar kitten koala lamb leopard lion lizard monkey moth otter
owl panda parrot penguin pig pony puppy rabbit rat raven seal shark snail snake spider squirrel swan tiger turtle whale
zebra
""".split()
COLOURS = """
amber aquamarine auburn azure beige black blue bronze brown burgundy cerise charcoal cobalt copper coral crimson cyan
ebony ecru emerald fuchsia gold green grey indigo ivory jade khaki lavender lilac magenta maroon mauve navy ochre pearl
periwinkle pink puce purple red ruby russet rust sapphire scarlet sepia sienna silver slate tan taupe teal turquoise
umber vermilion violet white yellow cerulean
""".split()
FOODS = """
almond apple apricot bagel banana beetroot berry biscuit burger cabbage cake carrot cherry chestnut coconut cookie
cracker crumpet cucumber dumpling egg fig grape hazelnut jelly kebab lemon lentil meatball melon mushroom muffin noodle
nut olive omelette onion pancake parsnip pastry peach peanut pear pepper pickle pie pizza plum pretzel pudding pumpkin
radish raisin salad sandwich sausage scone soup tart turnip waffle walnut
""".split()
OBJECTS = """
anchor bag ball basket bed bell belt blanket book bottle bowl box broom brush bucket button camera candle chain chair
clock coat cup curtain desk door drum envelope fan fence guitar hammer hat jacket key kettle lamp ladder mirror needle
nail paper pen pencil pillow pipe plate pot ring rope ruler saw shirt shoe spoon stool table tent towel umbrella wallet
window
""".split()
VERBS = """
accept add admire agree allow answer appear arrive ask attack bake bathe believe boil borrow bounce call carry cause
celebrate change chase check clean climb close collect copy count cover cross cry dance decide deliver discover dress
dry enjoy enter explain fail fill fold follow gather guess happen hate help hope hunt imagine improve invite join jump
kick kiss knock land laugh learn like listen live look love marry measure melt mend miss move name need notice obey
offer open order paint pass phone play polish pour pray promise push reach rescue rest return roll row sail save search
serve share shout sign smile sneeze sound start stay study talk taste thank touch try turn use visit wait walk want wash
watch whisper wipe wish wonder work worry
""".split()
NOUNS = ANIMALS + FOODS + OBJECTS

#: Task -> descriptions; ``_MAKERS`` has the generators of examples.
DESCRIPTIONS = {
    "syn_first_of_3": (
        "Return the first word of the comma-separated list.",
        "Write the item that the list begins with.",
        "Of three words, answer with the one that stands at the start.",
        "Copy only the opening entry of the list.",
        "Which word comes before all the others? Give it alone.",
        "Take the leftmost of the listed words.",
        "Name the first of the three items.",
        "Drop everything after the first comma.",
    ),
    "syn_last_of_3": (
        "Return the last word of the comma-separated list.",
        "Write the item that the list ends with.",
        "Of three words, answer with the one that stands at the end.",
        "Copy only the final entry of the list.",
        "Which word comes after all the others? Give it alone.",
        "Take the rightmost of the listed words.",
        "Name the third of the three items.",
        "Drop everything up to the last comma.",
    ),
    "syn_animal_in_list": (
        "Find the animal in the list and write only that word.",
        "One of the listed words is a creature; say which.",
        "Pick out the living being among the three words.",
        "Answer with the animal that is named.",
        "Which entry of the list is an animal?",
        "Ignore things and food; return the animal.",
        "Select the word that names a beast, bird or insect.",
        "Write the name of the animal hidden among other things.",
    ),
    "syn_colour_in_list": (
        "Find the colour in the list and write only that word.",
        "One of the listed words names a shade; say which.",
        "Pick out the hue among the three words.",
        "Answer with the colour that is named.",
        "Which entry of the list is a colour?",
        "Ignore animals and things; return the colour.",
        "Select the word that could describe a paint.",
        "Write the name of the colour hidden among other words.",
    ),
    "syn_food_in_list": (
        "Find the food in the list and write only that word.",
        "One of the listed words is something to eat; say which.",
        "Pick out what could be served at a meal.",
        "Answer with the food that is named.",
        "Which entry of the list can be eaten?",
        "Ignore colours and things; return the food.",
        "Select the word that belongs on a plate.",
        "Write the name of the food hidden among other words.",
    ),
    "syn_upper_case": (
        "Write the word in capital letters.",
        "Shout the word.",
        "Convert every letter to upper case.",
        "Repeat the input with all letters capitalised.",
        "Return the word as it looks when caps lock is on.",
        "Turn small letters into capitals.",
        "Print the word in block capitals.",
        "Change the whole word to uppercase.",
    ),
    "syn_first_letter": (
        "Return the first letter of the word.",
        "Which letter does the word start with?",
        "Write only the initial of the given word.",
        "Answer with the letter at the beginning.",
        "Cut the word down to its opening letter.",
        "Give the single letter that comes first in the spelling.",
        "Name the character in first place.",
        "Under which letter of a dictionary is this word found?",
    ),
    "syn_past_tense": (
        "Write the simple past of the verb.",
        "Put the verb into the past tense.",
        "Say it as something that happened yesterday.",
        "Answer with the past form of the given verb.",
        "How is this verb written in a story about last year?",
        "Change the verb from present to past.",
        "Give the form of the verb that ends in -ed.",
        "Conjugate the verb in the preterite.",
    ),
    "syn_plural": (
        "Write the plural of the noun.",
        "Put the noun into the form used for several of them.",
        "Say the word as if there were more than one.",
        "Answer with the plural form.",
        "One becomes many: change the noun accordingly.",
        "How is the word written when two are counted?",
        "Turn the singular noun into a plural one.",
        "Give the form of the noun that follows 'many'.",
    ),
    "syn_longer_word": (
        "Return the longer of the two words.",
        "Which word has more letters? Write it.",
        "Pick the word that takes more space.",
        "Compare the lengths and answer with the longer word.",
        "Of two words, choose the one with the greater number of letters.",
        "Leave out the shorter word.",
        "Select the word that is spelled with more characters.",
        "Write whichever word is longest.",
    ),
    "syn_twice": (
        "Write the word twice.",
        "Repeat the word, with a space between.",
        "Say it two times.",
        "Double the input: the word, then the word again.",
        "Echo the given word after itself.",
        "Return two copies of the word.",
        "Answer with the word followed by the same word.",
        "Print the word once more beside itself.",
    ),
    "syn_is_animal": (
        "Is it an animal? Answer yes or no.",
        "Say yes if the word names a creature, else no.",
        "Decide whether this is a living animal: yes or no.",
        "Tell animals from other things with yes or no.",
        "Answer yes for beasts, birds and insects, no for all else.",
        "Could this be found in a zoo or on a farm as an animal? yes or no",
        "Classify the word: yes means animal, no means something else.",
        "Write yes when the word is the name of an animal and no otherwise.",
    ),
}


def suite(examples: int = MAX_EXAMPLES, seed: int = 0) -> list[Task]:
    """Twelve tasks of ``examples`` examples each, in splits train, val and test; deterministic in ``seed``.

    Raises ConfigError unless ``examples`` is in [20, 120].
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or not MIN_EXAMPLES <= examples <= MAX_EXAMPLES:
        raise ConfigError(f"examples: expected a number from {MIN_EXAMPLES} to {MAX_EXAMPLES}, got {short_repr(examples)}")
    tasks = []
    for name, texts in DESCRIPTIONS.items():
        made: dict[str, str] = {}
        pairs = _MAKERS[name](Draw(f"{seed}/{name}"))
        while len(made) < examples:
            made.setdefault(*next(pairs))
        tasks.append(Task(name, texts, tuple(split(Example(x, (y,), "train") for x, y in made.items()))))
    return tasks


def _each(words: Sequence[str], answer: Callable[[str], str]) -> Callable[[Draw], Iterator[tuple[str, str]]]:
    """(word, answer) of every word once."""
    return lambda draw: ((word, answer(word)) for word in draw.shuffled(words))


def _position(index: int) -> Callable[[Draw], Iterator[tuple[str, str]]]:
    """Lists of three nouns and colours; the answer is the word at ``index``."""

    def make(draw: Draw) -> Iterator[tuple[str, str]]:
        while True:
            words = draw.shuffled(NOUNS + COLOURS)[:3]
            yield ", ".join(words), words[index]

    return make


def _kind(words: Sequence[str], *others: Sequence[str]) -> Callable[[Draw], Iterator[tuple[str, str]]]:
    """Lists of one of ``words`` and one of each of ``others``; the answer is the former."""

    def make(draw: Draw) -> Iterator[tuple[str, str]]:
        while True:
            wanted = draw.pick(words)
            yield ", ".join(draw.shuffled([wanted, *map(draw.pick, others)])), wanted

    return make


def _longer(draw: Draw) -> Iterator[tuple[str, str]]:
    while True:
        words = draw.shuffled(NOUNS)[:2]
        if len(words[0]) != len(words[1]):
            yield ", ".join(words), max(words, key=len)


def _is_animal(draw: Draw) -> Iterator[tuple[str, str]]:
    others = draw.shuffled(FOODS + OBJECTS)
    for animal, other in zip(draw.shuffled(ANIMALS), others, strict=False):
        yield animal, "yes"
        yield other, "no"


_MAKERS: dict[str, Callable[[Draw], Iterator[tuple[str, str]]]] = {
    "syn_first_of_3": _position(0),
    "syn_last_of_3": _position(2),
    "syn_animal_in_list": _kind(ANIMALS, OBJECTS, FOODS),
    "syn_colour_in_list": _kind(COLOURS, ANIMALS, OBJECTS),
    "syn_food_in_list": _kind(FOODS, COLOURS, OBJECTS),
    "syn_upper_case": _each(NOUNS, str.upper),
    "syn_first_letter": _each(NOUNS + COLOURS, lambda word: word[0]),
    "syn_past_tense": _each(VERBS, past),
    "syn_plural": _each(NOUNS, plural),
    "syn_longer_word": _longer,
    "syn_twice": _each(NOUNS, lambda word: f"{word} {word}"),
    "syn_is_animal": _is_animal,
}
