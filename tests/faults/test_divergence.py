"""Non-finite steps under real ZeRO, where accelerate makes backward and step in one call."""

import json
import os
import subprocess

import pytest
from faults.runs import LAUNCH, ROOT, WAIT_S
from tiny import CHATML, tiny_llama, tokenizer_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("stage", "precision", "clip"), [(2, "no", 1.0), (2, "bf16", 1.0), (3, "no", 0.0)])
def test_one_rank_at_fault_and_no_rank_makes_the_step(stage, precision, clip, extensions, tmp_path):
    tiny_llama(tokenizer_for(CHATML, "byte", eos="<|im_end|>")).save_pretrained(tmp_path / "model")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launch = subprocess.run(
        [*LAUNCH, f"training_configs/zero{stage}_cpu.yaml", "--mixed_precision", precision,
         "tests/faults/nonfinite_worker.py", str(tmp_path), precision, str(clip)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert (tmp_path / "found.json").exists(), launch.stdout[-2000:] + launch.stderr[-2000:]
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["moved"] == [True, True, False, True, False] and record["finite"]
    assert "step 3: the loss of row pair-5 is not finite; the step is skipped." in launch.stdout
    message = "step {}: a gradient, though no loss, of the step with rows pair-{}, pair-{} is not finite"
    assert message.format(5, 8, 9) in launch.stdout
    assert record["error"].startswith(message.format(6, 10, 11) + ", which makes 2 in a row (max_nonfinite_steps).")
