"""Traces: what a document leaves behind, the labels made of it, the store on disk, its checks."""
