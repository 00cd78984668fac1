"""virtmig: live migration with a handshake."""
