"""What the tests of the GPU suite share: rates of a card, and this CPU in its place."""

from bench.gpu.ceilings import Ceilings
from bench.gpu.timing import Dry, Timing

RATES = Ceilings(3350.0, 3000.0, {"bfloat16": 989e3, "float32": 50e3, "tf32": 420e3})
H100_L2 = 50 << 20


class Card(Dry):
    """This CPU as a card: what rows and errors then mean."""

    on_card = True


def timed(us, graph=True):
    return Timing.of([us * 0.9, us, us * 1.1], 1, graph)
