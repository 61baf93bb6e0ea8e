"""Trace dumps of the FlashMemory release, read into ordinary trace stores."""
