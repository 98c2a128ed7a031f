"""What workers say to each other: collectives, and the tap that keeps what crossed the wire."""
