"""End-to-end tasks: what a model answers under lookahead sparse attention, beside full attention and the baselines."""
