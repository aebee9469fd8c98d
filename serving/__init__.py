"""One replica: prompts in, tokens of exactly one version out, versions swapped while it serves."""
