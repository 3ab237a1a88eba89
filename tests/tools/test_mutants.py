import ast

import pytest

from tests.mutants import ROOT, TESTS, Mutant, is_seen, mutants_of

SOURCE = '''"""Doc 1 < 2."""
LIMIT: int | None = 3

def grow(value: int | None, é: float = 0.5) -> int | str:
    if value is None and not é > 1:
        value.count = 4
    value.total += 1
    log("å", value - 1)
    return value * 2
'''


def lines(source):
    """Each mutant's line, as it becomes."""
    return {
        mutant.apply(source).splitlines()[mutant.line - 1].strip() for mutant in mutants_of("a.py", source)
    }


def test_operators_constants_and_statements_change_and_nothing_else():
    assert lines(SOURCE) == {
        "LIMIT: int | None = 4",
        "def grow(value: int | None, é: float = 1.5) -> int | str:",
        "if value is None or not é > 1:",
        "if value is not None and not é > 1:",
        "if value is None and é > 1:",
        "if value is None and not é >= 1:",
        "if value is None and not é > 2:",
        "value.count = 5",
        "pass",
        "value.total += 2",
        'log("å", (value) + (1))',
        'log("å", value - 2)',
        "return (value) / (2)",
        "return value * 3",
    }


@pytest.mark.parametrize("path", TESTS)
def test_every_mutant_of_the_core_is_python(path):
    source = (ROOT / path).read_text()
    found = list(mutants_of(path, source))
    assert len(found) > 20
    for mutant in found:
        changed = mutant.apply(source)
        assert changed != source
        ast.parse(changed)


def test_a_mutant_is_seen_by_a_test_that_minds_it_and_is_taken_back(tmp_path):
    (tmp_path / "half.py").write_text("def half(x):\n    return x / 2\n")
    test = "from half import half\n\ndef test_half():\n    assert half({}) == {}\n"
    (tmp_path / "test_good.py").write_text(test.format(4, 2))
    (tmp_path / "test_blind.py").write_text(test.format(0, 0))
    mutant = Mutant("half.py", 2, 11, 16, "x * 2")
    assert is_seen(tmp_path, mutant, ["test_good.py"], 60)
    assert not is_seen(tmp_path, mutant, ["test_blind.py"], 60)
    assert not is_seen(tmp_path, None, ["test_good.py"], 60)
