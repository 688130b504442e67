# SPDX-License-Identifier: Apache-2.0

"""What the documentation tells to type: the `anomalib` command accepts it, and code of one's own runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from torch import nn

from anomalib_lake import LAKE
from anomalib_spg import GuideSettings
from anomalib_spg.guides import read_guides
from anomalib_spg.synthesis import AnomalySynthesizer
from anomalib_spg.torch_model import STAGE_2
from tests.helpers import REPOSITORY, TINY, data, engine

READMES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]
DOCUMENTS = [*READMES, REPOSITORY / "RESULTS.md", *sorted(REPOSITORY.glob("configs/*.yaml"))]


def code(path: Path, language: str) -> list[str]:
    """The code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Arguments of each `anomalib` command, as they stand in the READMEs."""
    blocks = "\n".join(block for path in READMES for block in code(path, "bash"))
    lines = blocks.replace("\\\n", "").replace(" && ", "\n")
    return re.findall(r"^(?:\.venv/bin/)?anomalib ((?:train|test|predict|export) .*)", lines, flags=re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_one_form_of_arguments(path: Path) -> None:
    """`--model.<argument>`, which the command takes wherever it takes `--model.init_args.<argument>`."""
    assert not re.findall(r"--\w+\.init_args\S*", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its arguments are known and of the right type; with `--print_config` it does no more than read them."""
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command.replace("<your config>", "configs/spg_textures.yaml"))
    with pytest.raises(SystemExit) as done:
        AnomalibCLI(args=[*words, "--print_config"])
    assert done.value.code == 0, capsys.readouterr().err


def run(method: str, word: str, **names: Any) -> dict[str, Any]:
    """Run the code block of a method's README that has this word in it; return the names it leaves."""
    (block,) = [block for block in code(REPOSITORY / method / "README.md", "python") if word in block]
    exec(compile(block, f"{method}/README.md", "exec"), names)  # noqa: S102  # our own text
    return names


@pytest.mark.slow
def test_a_rule_of_ones_own(quickstart: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It chooses other neurons and tells defects apart; a checkpoint of a LAKE with it is read by one without."""
    monkeypatch.chdir(quickstart.parent)
    names = run("anomalib_lake", "RobustNeurons")
    assert names["good"].max() < names["bad"].min()
    for neurons in names["model"].neurons:
        by_variance = neurons.variances.argsort(descending=True)[: neurons.count].tolist()
        assert len(neurons.indices) == len(by_variance) == 100
        assert set(neurons.indices.tolist()) != set(by_variance)

    arguments = {"backbone": TINY, "pre_trained": False, "image_size": 64, "k_shot": 2, "num_neurons": 20}
    lake = LAKE(**arguments, visualizer=False)
    lake.model.neurons = nn.ModuleList(names["RobustNeurons"](count=20) for _ in lake.model.layers)
    fit = engine(tmp_path)
    fit.fit(lake, datamodule=data(mvtec))
    images = torch.rand(2, 3, 64, 64)
    plain = LAKE.load_from_checkpoint(fit.best_model_path)
    torch.testing.assert_close(plain.eval()(images).pred_score, lake.cpu().eval()(images).pred_score)


@pytest.mark.slow
def test_a_dictionary_of_ones_own(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guides are made of its atoms, and tell what is drawn from what is not; their file says what is known."""
    (tmp_path / "quickstart").symlink_to(quickstart)
    monkeypatch.chdir(tmp_path)
    images, masks = AnomalySynthesizer()(torch.rand(6, 3, 448, 448))
    dictionary = torch.randn(200, 384)
    names = run("anomalib_spg", "train_guides", images=images, masks=masks, dictionary=dictionary)
    guides = names["model"].guides[0]
    expected = nn.functional.normalize(dictionary, dim=1)[guides.atom_indices]
    assert len(guides.atoms)
    torch.testing.assert_close(guides.atoms, expected)
    marked = masks.flatten(1).any(dim=1)
    assert names["scores"][marked].min() > names["scores"][~marked].max()
    tensors, metadata = read_guides(tmp_path / "guides.safetensors")
    assert metadata["settings"] == {name: getattr(GuideSettings(ema_warmup=True), name) for name in STAGE_2}
    assert torch.equal(tensors["0.vectors"], guides.vectors)
