"""Deployment: models as files that other engines run (Table 1 is measured with them). Notebook 06 tells the story."""
