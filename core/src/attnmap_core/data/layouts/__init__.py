"""One small parser per official data layout; each gives a :class:`~.listing.Listing` and opens no photo."""
