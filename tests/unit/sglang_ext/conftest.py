"""Imports SGLang once, with what its import says of machines without a GPU kept apart."""

from __future__ import annotations

import importlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("sglang.srt.managers.scheduler")
