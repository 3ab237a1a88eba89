import pytest

from common.model.__main__ import main


def test_summary_prints_layers_and_flops(capsys):
    assert main(["--model", "resnet50", "--sizes", "64", "32x96"]) == 0
    out = capsys.readouterr().out
    assert "25,557,032" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["layer1.0.conv2"] == ["layer1.0.conv2", "Conv2d", "64x8x24", "36,864"]
    # torchvision states 4.09 billion multiply-adds at 224 x 224; convolutions scale with the area.
    assert float(lines["64"][3]) == pytest.approx(2 * 4.09 * (64 / 224) ** 2, rel=0.01)
    assert lines["32"][4] == "ok"


def test_summary_says_what_a_model_cannot_take(capsys):
    assert main(["--model", "vit_tiny_patch16_224", "--sizes", "32", "40"]) == 1
    assert "divisible" in capsys.readouterr().out
    assert main(["--model", "resnet51"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--sizes", "big"])
