"""Domain XML, lxml only: what the XML of a guest says, without a daemon."""
