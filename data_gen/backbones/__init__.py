"""Adapters that read a frozen backbone, one per attention family."""
