"""Questions asked and scored: `evaluate.py` asks one set, `run.py` runs a whole `trl-search eval` around it.

evaluate.py ── outcomes.py    one outcome per question, and their means with intervals
run.py ── sets.py             what is asked
       ├─ backends.py         who answers
       ├─ settings.py         everything that defines the number, and what may not change in a folder
       ├─ answers_file.py     one line per finished question, so that a killed evaluation goes on
       └─ table.py ── published_scores.py
"""
