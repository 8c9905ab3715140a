from tests.research.tasks.conftest import t2l_tasks  # noqa: F401
