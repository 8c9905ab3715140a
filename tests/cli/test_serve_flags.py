"""``t2l serve-flags``: vLLM's flags for a checkpoint, and what to set beside them."""

import json
import shlex

import pytest

from tests.cli.conftest import save_checkpoint
from tests.hypernetwork.test_doc_to_lora import GOLDEN, NAMES


def flags(rank, modules="q_proj v_proj o_proj down_proj", slots=8, cached=256):
    return (
        f"--enable-lora --max-lora-rank {rank} --max-loras {slots} --max-cpu-loras {cached} --generation-config vllm "
        f"--lora-target-modules {modules}"
    )


def test_flags_are_one_line_and_the_rest_is_on_stderr(run):
    status, out, err = run("serve-flags", "smollm2-135m")
    assert (status, out) == (0, flags(8) + "\n")
    assert err.splitlines() == [
        "t2l: environment: T2L_VLLM_CHECKPOINT=smollm2-135m VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        "t2l: endpoint: /v1/completions",
    ]


def test_flags_of_a_folder(run, checkpoint, tmp_path):
    folder = checkpoint.rename(tmp_path / "two words")
    status, out, err = run("serve-flags", folder, "--max-loras", 64, "--max-cpu-loras", 64)
    assert (status, out) == (0, flags(8, "q_proj", 64, 64) + "\n"), "rank 4 needs 8"
    assert f"T2L_VLLM_CHECKPOINT={shlex.quote(str(folder))} " in err and "endpoint: /v1/chat/completions\n" in err


def test_flags_of_several_hold_adapters_of_all(run, tmp_path):
    status, out, err = run("serve-flags", "smollm2-135m", save_checkpoint(tmp_path, 20))
    assert (status, out) == (0, flags(32) + "\n")
    assert f"T2L_VLLM_CHECKPOINT=smollm2-135m,{tmp_path} " in err and "endpoint: /v1/completions\n" in err


def test_json_and_prompts_with_descriptions(run, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["training"] = {"prompt": "description", "prompt_form": "raw"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    status, out, err = run("serve-flags", checkpoint, "--json")
    about = json.loads(out)
    assert (status, err, " ".join(about["flags"])) == (0, "", flags(8, "q_proj"))
    assert about["environment"]["T2L_VLLM_CHECKPOINT"] == str(checkpoint)
    assert (about["endpoint"], about["description_in_prompt"]) == ("/v1/completions", True)
    assert "endpoint: /v1/completions, with the description in the prompt" in run("serve-flags", checkpoint)[2]


@pytest.mark.parametrize("rank, given", [(1, 1), (2, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_the_smallest_rank_that_vllm_takes(run, tmp_path, rank, given):
    status, out, err = run("serve-flags", save_checkpoint(tmp_path, rank))
    if given is None:
        assert (status, err) == (1, f"t2l: {tmp_path}: rank 513: vLLM takes adapters up to rank 512\n")
    else:
        assert f"--max-lora-rank {given} " in out


@pytest.mark.parametrize("chunks, given", [(None, 8), (3, 16), (4, 32), (127, 512), (128, None)])
def test_ranks_of_documents(run, chunks, given):
    """Rank 4 for every chunk, and for the bias."""
    status, out, err = run("serve-flags", "smollm2-135m-paper", GOLDEN / NAMES[0], *(("--chunks", chunks) if chunks else ()))
    if given is None:
        assert status == 1 and "rank 516: vLLM takes adapters up to rank 512: --chunks: expected at most 127, got 128" in err
    else:
        assert (status, out) == (0, flags(given, "q_proj v_proj down_proj") + "\n")


def test_what_the_server_would_refuse_is_refused(run, tmp_path):
    """More slots than adapters that are kept, folders of one name, one with a comma, at which the variable is divided."""
    status, out, err = run("serve-flags", "smollm2-135m", "--max-loras", 9, "--max-cpu-loras", 8)
    assert (status, out) == (1, "") and err == "t2l: --max-cpu-loras: expected at least --max-loras, 9, got 8\n"
    assert run("serve-flags", "nowhere")[0] == 1
    status, out, err = run("serve-flags", "smollm2-135m-paper", "--chunks", 2)
    assert status == 1 and "--chunks: expected a checkpoint that reads documents, got ['smollm2-135m-paper']" in err
    for place in ("a/best", "b/best", "one,two"):
        save_checkpoint(tmp_path / place)
    status, out, err = run("serve-flags", tmp_path / "a/best", tmp_path / "b/best")
    assert (status, out) == (1, "") and "T2L_VLLM_CHECKPOINT: expected folders of different names, got" in err
    status, out, err = run("serve-flags", tmp_path / "one,two")
    assert (status, out) == (1, "") and "T2L_VLLM_CHECKPOINT: " in err and str(tmp_path / "one") in err
