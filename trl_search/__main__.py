"""Runs `trl-search`, so that `accelerate launch -m trl_search train qwen3b` works."""

from __future__ import annotations

import sys

from trl_search.cli.main import main

sys.exit(main())
