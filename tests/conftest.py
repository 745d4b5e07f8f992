"""What every test may rely on: no network, reproducible property tests."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("reproducible")
