"""A tier-1 support desk of the online shop Larkfield: agents, tools, data, requests and a scorecard."""
