"""What a killed process left unfinished is gone when the same command has run again, whichever verb wrote it."""

import shutil

import pytest
import torch
import yaml

from data_gen.flashmemory.document import V4_FLASH
from indexer_train.formats.flashmemory import write_checkpoint
from indexer_train.formats.weights import LayerWeights
from tests.data_gen.flashmemory.test_import import TRACE, dump, save

VERBS = ["generate", "import", "calibrate", "export", "plan", "decode"]


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_killed_process_left_goes_with_the_next_run(finished, recipe, lookahead, tmp_path, verb):
    out = tmp_path / "out"
    commands = prepared(verb, finished, recipe, out, tmp_path)
    out.mkdir(exist_ok=True)
    for folder in {out, *out.glob("0000"), *(path.parent for path in out.rglob("spec.json"))}:
        (folder / ".unfinished-x.json").write_text("half")
    for command in commands:
        assert lookahead(*command)[0] == 0
    assert not list(out.rglob(".unfinished-*"))


def prepared(verb, finished, recipe, out, tmp_path):
    """The commands of a verb that writes to `out`, and what they need."""
    if verb == "generate":
        return [["generate", recipe, "--out", out, "--plan-only"]]
    if verb == "import":  # in shards, of which the last finds all there
        for number in range(2):
            save(tmp_path / "dumps", number, dump(seed=number))
        settings = yaml.safe_load(recipe.read_text()) | {"trace": TRACE.model_dump(mode="json")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        (out / "0000").mkdir(parents=True)
        command = ["import", tmp_path / "recipe.yaml", "--dumps", tmp_path / "dumps", "--out", out, "--shard"]
        return [[*command, "0/2"], [*command, "1/2"]]
    if verb == "calibrate":
        shutil.copytree(finished / "indexer", out)
        return [["calibrate", recipe, "--indexer", out, "--traces", finished / "traces" / "heldout"]]
    if verb == "export":
        hidden, width, theirs = V4_FLASH.hidden, V4_FLASH.key_width, tmp_path / "theirs.pt"
        parts = torch.randn(8, hidden), torch.ones(8), torch.randn(4 * width, 8), torch.randn(4, hidden)
        rope = V4_FLASH.rope.model_copy(update={"positions": 64})
        write_checkpoint({10: LayerWeights(*parts)}, rope, theirs, "flashmemory-joint")
        export = ["export", "--indexer", tmp_path / "ours", "--out", out, "--format", "flashmemory-layers"]
        return [["convert", theirs, "--out", tmp_path / "ours"], export]
    if verb == "plan":
        return [["plan", "deepseek-v4-flash", "--context", 32768, "--out", out]]
    (tmp_path / "prompt.txt").write_text("The bicycle is kept behind the shed. " * 3)
    asked = ["--bundle", finished / "bundle", "--prompt", tmp_path / "prompt.txt", "--new-tokens", 2]
    return [["decode", recipe, *asked, "--out", out]]
