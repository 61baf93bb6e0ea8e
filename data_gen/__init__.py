"""Long documents and a frozen backbone in, attention traces out."""
