"""The report of a run: one HTML page that works offline, charts as PNG, and the reflection figure."""
