# SPDX-License-Identifier: Apache-2.0

"""Addresses on the hub: the real client of the hub in a process of its own, and a hub on this machine."""

import json
import re
import sys
from pathlib import Path

import pytest

from anomalib_spg.components.hub import _parse, beside, local_file
from tests.helpers import REPOSITORY, run_command
from tests.hub_server import COMMIT, Hub, serve

ASK = """
import json, sys
from anomalib_spg.components.hub import local_file
found = {}
for address in sys.argv[1:]:
    try:
        found[address] = local_file(address).read_text()
    except (ValueError, RuntimeError) as exception:
        found[address] = f"{type(exception).__name__}: {exception}"
print(json.dumps(found))
"""
KNOWN = "hf://me/guides/a.safetensors"
FOUND = {
    KNOWN: "a",
    "hf://me/guides/folder/b.safetensors": "b",
    "hf://me/guides@v1/a.safetensors": "a",
    "hf://me/guides/folder/b.safetensors@v1": "b",
    "hf://me/guides@refs/pr/1/a.safetensors": "a",
    f"hf://me/guides@{COMMIT}/a.safetensors": "a",
}
REFUSED = {
    "hf://me/none/a.safetensors": "ValueError: .*no model repository 'me/none', or a private one.*copy it here",
    "hf://me/gated/a.safetensors": "ValueError: .*has not given you access.*copy it here",
    "hf://me/guides/c.safetensors": "ValueError: .*'me/guides' has no file 'c.safetensors'. Look",
    "hf://me/guides@v1/c.safetensors": "ValueError: .*has no file 'c.safetensors' of revision 'v1'",
    "hf://me/guides@v9/a.safetensors": "ValueError: .*no branch, tag or commit 'v9'",
    "hf://me/gui--des/a.safetensors": "ValueError: .*no address.*gui--des.*hf://owner",
}
NEW = "hf://me/guides/new.safetensors"


def ask(hub: Hub, home: Path, *addresses: str, offline: int = 0) -> dict[str, str]:
    """What another process finds at each address: the file's text, or the error."""
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(offline)}
    printed = run_command(
        [sys.executable, "-c", ASK, *addresses],
        home,
        PYTHONPATH=str(REPOSITORY),
        **environment,
    )
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the hub's client keeps its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """A hub that has been asked, and is gone."""
    root = tmp_path_factory.mktemp("hub")
    (root / "me/guides/folder").mkdir(parents=True)
    (root / "me/gated").mkdir()
    (root / "me/guides/a.safetensors").write_text("a")
    (root / "me/guides/folder/b.safetensors").write_text("b")
    return Hub(root)


@pytest.fixture(scope="module")
def answers(hub: Hub, home: Path) -> dict[str, str]:
    """What there is at every address."""
    with serve(hub):
        return ask(hub, home, KNOWN, *FOUND, *REFUSED)


@pytest.mark.command
def test_files_are_fetched(answers: dict[str, str], hub: Hub) -> None:
    """By branch, tag, pull request and commit; one question in a process for an address, no second for a known file."""
    assert {address: answers[address] for address in FOUND} == FOUND
    assert hub.asked.count("HEAD /me/guides/resolve/main/a.safetensors") == 1
    assert [text for text in hub.asked if text.startswith("GET") and text.endswith("a.safetensors")] == [
        "GET /me/guides/resolve/main/a.safetensors"
    ]


@pytest.mark.command
@pytest.mark.parametrize("address", REFUSED)
def test_what_is_not_there(answers: dict[str, str], address: str) -> None:
    """The address, what is wrong with it, and what to do."""
    assert re.match(REFUSED[address], answers[address])
    assert f"'{address}'" in answers[address]


@pytest.mark.command
@pytest.mark.parametrize("offline", [0, 1])
def test_the_cache_is_enough(answers: dict[str, str], hub: Hub, home: Path, offline: int) -> None:
    """With no hub to be reached, and with HF_HUB_OFFLINE, in which case what is not there is not waited for."""
    assert answers
    asked = [*FOUND, *([NEW] * offline)]
    found = ask(hub, home, *asked, offline=offline)
    if offline:
        message = found.pop(NEW)
        assert message.startswith(f"RuntimeError: '{NEW}' is not in the hub's cache")
        assert "HF_HUB_OFFLINE" in message
        assert "copy it here and give its path" in message
    assert found == FOUND


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://me/guides",
        "hf://me/guides/a.bin",
        "hf://me/a.safetensors",
        "hf://me/guides@v1/a.safetensors@v2",
        "hf://me/guides@/a.safetensors",
        "hf://me/guides/a.safetensors@",
        "hf://me/guides/../other/a.safetensors",
        "hf://me/guides//a.safetensors",
        "hf://datasets/me/guides/a.safetensors",
        "hf://me/gui des/a.safetensors",
        "HF://me/guides/a.safetensors",
        Path("hf://me/guides/a.safetensors"),
        "https://huggingface.co/me/guides/blob/main/a.safetensors",
    ],
)
def test_malformed_addresses(address: str | Path) -> None:
    """Named, with the form; the hub is not asked."""
    with pytest.raises(ValueError, match="is no address of a file on the hub. Write hf://owner/repository/") as caught:
        local_file(address)
    assert f"'{address}'" in str(caught.value)


@pytest.mark.parametrize("path", ["guides.safetensors", "/a/b", "", "a@b/c.safetensors", "C:/a.safetensors", "a:b"])
def test_local_paths_stay(path: str) -> None:
    """Whether there is such a file or not."""
    assert local_file(path) == Path(path)


@pytest.mark.parametrize("revision", ["feature/x", "refs/pr/1", "v1", COMMIT])
def test_beside_a_file_whose_revision_stands_at_the_end(revision: str) -> None:
    """The file beside is of the same revision, also where its name has slashes."""
    address = beside(f"hf://me/guides/x/a.safetensors@{revision}", "b.safetensors")
    assert _parse(address) == ("me/guides", revision, "x/b.safetensors")
    assert _parse(beside("hf://me/guides/a.safetensors@" + revision, "b.safetensors"))[1:] == (
        revision,
        "b.safetensors",
    )


def test_beside() -> None:
    """The same repository and revision, where that was named."""
    expected = "hf://me/guides@v1/x/b.safetensors"
    assert beside("hf://me/guides@v1/x/a.safetensors", "b.safetensors") == expected
    assert beside("hf://me/guides/x/a.safetensors@v1", "b.safetensors") == "hf://me/guides/x/b.safetensors@v1"
    assert beside("hf://me/guides/a.safetensors", "b.safetensors") == "hf://me/guides/b.safetensors"
