"""The release controller: a published version goes through gate, shadow and canary to stable, or back."""
