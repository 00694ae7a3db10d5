"""What `trl-search eval` does around `evaluate.py`: sets of questions, records that survive a kill, settings, tables.

run.py ── sets.py        what is asked
       ├─ backends.py    who answers
       ├─ settings.py    everything that defines the number, and what may not change in a folder
       ├─ records.py     one line a finished question
       └─ table.py ── published.py
"""
