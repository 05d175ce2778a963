import pytest

from tests.recalibrator.small_recalibrators import FAMILIES


@pytest.fixture(params=FAMILIES)
def student_config(request):
    return FAMILIES[request.param]
