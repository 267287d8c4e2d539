"""What a conversion changed: parameters, multiply-adds, maps, the smallest input."""
