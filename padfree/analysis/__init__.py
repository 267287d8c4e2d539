"""Questions to a recording: maps, domains, chains, convolutions, sites. Pure."""
