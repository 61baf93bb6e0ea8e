"""The engine kit: Level 1, resident sets, paged keys, Level 2. Imports no Hugging Face."""
