//! Retinue's data-plane engine: WireGuard over TUN and UDP, driven by the UAPI socket.
//!
//! Layers, from pure to I/O: `crypto` (and `accelerated`), `replay`, `router`, `packet`, `noise`, `cookie`, `timers`,
//! `offload`; `peer` and `device` (the protocol core, sans I/O); `tx` and `rx` (packet paths over
//! traits); `state` and `handover` (to the next process); `sys`, `tun`, `udp`, `netlink` (Linux); `engine`, `worker`, `uapi`, `server`, `daemon`.
//!
//! Unsafe code is confined to the modules that say so below: calls into AWS-LC and its faster double, into the kernel,
//! and one vectorised loop. Each block states why it is sound.

#![deny(unsafe_code)]

#[allow(unsafe_code)] // the Intel Multi-Buffer Crypto library
pub mod accelerated;
#[allow(unsafe_code)] // seccomp
pub mod confine;
pub mod cookie;
pub mod courtesy;
#[allow(unsafe_code)] // AWS-LC
pub mod crypto;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod error;
pub mod events;
pub mod gate;
#[allow(unsafe_code)] // descriptors in control messages
pub mod handover;
pub mod log;
#[allow(unsafe_code)] // sockets
pub mod netlink;
pub mod noise;
pub mod offload;
#[allow(unsafe_code)] // AVX2 checksum
pub mod packet;
pub mod peer;
pub mod replay;
pub mod router;
pub mod rx;
pub mod server;
pub mod stamps;
pub mod state;
#[allow(unsafe_code)] // system calls
pub mod sys;
pub mod timers;
#[allow(unsafe_code)] // ioctl, readv, writev
pub mod tun;
pub mod tx;
pub mod uapi;
#[allow(unsafe_code)] // sendmsg, recvmmsg and their control messages
pub mod udp;
pub mod worker;

#[cfg(test)]
mod accelerated_tests;
#[cfg(test)]
mod attack_tests;
#[cfg(test)]
mod conformance_tests;
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
mod state_tests;
#[cfg(test)]
mod uapi_tests;

#[cfg(feature = "python")]
#[allow(unsafe_code)] // what pyo3's macros expand to
mod python;
