"""What a taste, mistakes, malice and a change of mind do to what is learned: ``make experiments``, seeded."""
