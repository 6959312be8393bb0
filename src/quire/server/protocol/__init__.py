"""What goes over the wire: request bodies in, response bodies out."""
