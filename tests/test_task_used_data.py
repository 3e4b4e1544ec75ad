"""data.json of a run folder: written by others it is data, whatever it holds."""

import pytest

from neco.runs import used_data
from neco.utils.errors import NecoError


@pytest.mark.parametrize("text", ["", "5", "null", "[[1, 2]]", '{"a": 1}', '{"a": [1, 2, 3]}', "[" * 100_000])
def test_what_is_no_list_of_digests_says_nothing(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    assert used_data.changed(tmp_path, build=lambda node: pytest.fail(f"{node} was built")) is None


def test_a_node_that_there_is_not_is_an_error(tmp_path):
    def build(node: str) -> None:
        raise NecoError(node)

    (tmp_path / "data.json").write_text('{"os.system/x": ["all", 1]}')
    with pytest.raises(NecoError, match=r"os\.system"):
        used_data.changed(tmp_path, build)
