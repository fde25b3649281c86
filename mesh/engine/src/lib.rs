//! Retinue's data-plane engine: WireGuard over TUN and UDP, driven by the UAPI socket.
//!
//! Layers, from pure to I/O: `crypto`, `replay`, `router`, `packet`, `noise`, `cookie`, `timers`,
//! `offload`; `peer` and `device` (the protocol core, sans I/O); `tx` and `rx` (packet paths over
//! traits); `sys`, `tun`, `udp`, `netlink` (Linux); `engine`, `worker`, `uapi`, `server`, `daemon`.

pub mod cookie;
pub mod crypto;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod error;
pub mod events;
pub mod log;
pub mod netlink;
pub mod noise;
pub mod offload;
pub mod packet;
pub mod peer;
pub mod replay;
pub mod router;
pub mod rx;
pub mod server;
pub mod sys;
pub mod timers;
pub mod tun;
pub mod tx;
pub mod uapi;
pub mod udp;
pub mod worker;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
#[cfg(test)]
mod mutation_tests;
#[cfg(test)]
mod offload_tests;
#[cfg(any(test, feature = "fuzzing"))]
pub mod sim;
#[cfg(test)]
mod sim_tests;
#[cfg(test)]
mod uapi_tests;

#[cfg(feature = "python")]
mod python;
