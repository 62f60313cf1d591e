"""What a run costs, measured on the real thing: ``python -m bench``; see README.md."""
