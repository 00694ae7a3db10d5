"""What a run looks like: figures as PNG, the reflection figure, and one HTML page that opens offline."""
