"""The server wing is NumPy only: with torch blocked, three rounds of every rule and mechanism run with NumPy sites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fedvfm.aggregators import table as rules
from fedvfm.privacy import table as mechanisms

SERVER_TESTS = Path(__file__).parents[1] / "server"

SCRIPT = """
import json, sys
from pathlib import Path

BLOCKED = ("torch", "torchvision", "transformers", "peft", "monai")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked: the server wing must not need it")

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import fedvfm, fedvfm.config.schema, fedvfm.protocol.protocol, fedvfm.trust.locked_recipe
import fedvfm.state.state, fedvfm.storage.hash_chain, fedvfm.storage.storage
import fedvfm.server.app
import numpy_sites
from fedvfm.server import app
from fedvfm.state import checkpoint
from fedvfm.aggregators import table
from fedvfm.config import privacy
from fedvfm.privacy import table as mechanisms
from fedvfm.flower import internals as flower
from fedvfm.server.rounds import result

found, private = {}, {}
STEP = {"name": "sgd", "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
for rule in table.TABLE.names():
    mixed = table.TABLE.get(rule).mixed_ranks
    members = [numpy_sites.NumpySite("north", rank=2 if mixed else 3), numpy_sites.NumpySite("west", examples=30)]
    weighting = "uniform" if table.TABLE.get(rule).robust else "examples"
    beside = {"residual": 5} if table.keeps_residual(table.TABLE.get(rule)) else {}
    adapter = {"rank": 3, "alpha": 6.0, "options": beside}
    recipe = numpy_sites.make_recipe(rounds=3, aggregation={"rule": rule, "weighting": weighting}, adapter=adapter)
    job = numpy_sites.make_job(Path(sys.argv[2]) / rule, members, recipe, per_sample=True, test_best=True)
    grid = numpy_sites.LoopGrid(numpy_sites.client_app(members), len(members))
    app.make_server_app([job])(grid, flower.context(1, 1, {}))
    journal = (job.folder / "journal.jsonl").read_text().splitlines()
    found[rule] = {"rounds": len(journal)}
    found[rule] |= {"fingerprint": checkpoint.read(job.folder / "adapter.safetensors")[0].fingerprint}
    made = result.write(job.folder, "town", job.locked)
    found[rule] |= {"macro": made["arms"]["federated"]["macro"], "saved": sorted(
        path.name for path in (job.folder / "adapter").iterdir()
    )}
for mechanism in mechanisms.TABLE.names():
    adaptive = {"adaptive_quantile": 0.5} if mechanism == "site-level" else {}
    target = {"noise_multiplier": 1.0} if mechanism in privacy.SHARED else {"epsilon": 8.0}
    asked = {"mechanism": mechanism, "clip": 1.0, "delta": 1e-5, **target, **adaptive}
    members = [numpy_sites.NumpySite("north"), numpy_sites.NumpySite("south"), numpy_sites.NumpySite("west")]
    settings = {} if mechanism == "none" else {"privacy": asked, "aggregation": {"weighting": "uniform"}}
    if mechanism in privacy.SHARED:
        settings |= {"min_sites": 3, "secure_aggregation": {}, "optimiser": STEP}
    recipe = numpy_sites.make_recipe(rounds=3, **settings)
    job = numpy_sites.make_job(Path(sys.argv[2]) / mechanism, members, recipe, simulated=True)
    grid = numpy_sites.LoopGrid(numpy_sites.client_app(members), len(members))
    app.make_server_app([job])(grid, flower.context(1, 1, {}))
    private[mechanism] = len((job.folder / "journal.jsonl").read_text().splitlines())
loaded = sorted(name for name in sys.modules if name.partition(".")[0] in BLOCKED)
print(json.dumps({"rules": found, "mechanisms": private, "loaded": loaded}))
"""


def run(tmp_path: Path, name: str) -> dict[str, object]:
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    command = [sys.executable, "-c", SCRIPT, str(SERVER_TESTS), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_three_rounds_of_every_rule_with_torch_blocked(tmp_path: Path) -> None:
    found = run(tmp_path, "one")
    assert found["loaded"] == []
    made = found["rules"]
    assert isinstance(made, dict)
    assert sorted(made) == rules.TABLE.names()
    assert all(row["rounds"] == 3 for row in made.values())
    assert all(row["saved"] == ["README.md", "fedvfm.json", "fedvfm_adapter.safetensors"] for row in made.values())
    assert all(0.0 < row["macro"] < 1.0 for row in made.values())
    assert found["mechanisms"] == dict.fromkeys(mechanisms.TABLE.names(), 3)
    assert found == run(tmp_path, "two"), "a fresh process ends with the same adapters"


def test_the_package_itself_imports_neither_torch_nor_flower() -> None:
    script = "import sys, fedvfm; print([n for n in ('torch', 'flwr', 'numpy', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
