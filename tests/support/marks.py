"""Cases that the quick suite can do without."""

from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)  # a case like others, which the quick suite has
