"""Real runs against the reference: each step's loss, norm, rate and routing, evaluations, weights and moments."""

import pytest

from tests.data.factory import make_dataset
from tests.reference.comparison import Bands, differences
from tests.reference.conftest import Run
from tests.reference.runs import CORPORA, RUNS, STOPS, VOCAB, sections_of

# A run computes in FP32, which rounds each number by 6e-8: so a loss and a norm, sums of many; a moment by some tens of
# that, as the gradients in it cancel. An update also has the rounding of the weight that it changes: of a norm's 1.0
# where the whole change is 2e-3. Measured on these runs: 1.4e-7, 1.9e-7, 2.8e-5 and 3e-6.
BANDS = Bands(loss=1e-6, norm=2e-6, update=1e-4, moment=2e-5)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {name: str(make_dataset(folder / name, size, VOCAB, size)) for name, size in CORPORA.items()}


@pytest.mark.parametrize("name", RUNS)
def test_run_equals_the_reference(train: Run, corpora: dict[str, str], name: str) -> None:
    problems, _ = differences(train(sections_of(RUNS[name], corpora), STOPS.get(name)), BANDS)
    assert not problems, "\n".join(problems)
