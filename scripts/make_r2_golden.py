"""scikit-learn's R² for the pairs of `tests/evaluation/test_against_scikit_learn.py`, written to tests/golden/r2_score.json.

python -m venv golden && golden/bin/pip install torch numpy scikit-learn
PYTHONPATH=src:. golden/bin/python scripts/make_r2_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import sklearn
from sklearn.metrics import r2_score

from tests.evaluation.recipes import PAIRS, pair

if __name__ == "__main__":
    values = {name: float(r2_score(*pair(name), multioutput="variance_weighted")) for name in PAIRS}
    target = Path("tests/golden/r2_score.json")
    target.write_text(json.dumps({"scikit-learn": sklearn.__version__, "r2_score": values}, indent=2) + "\n")
    print(target.read_text())
