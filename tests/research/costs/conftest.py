"""What the tests of counts share: tiny products are slower on more threads; what is counted does not depend on them."""

from tests.research.training.conftest import one_thread  # noqa: F401
