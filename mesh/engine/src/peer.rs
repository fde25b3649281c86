//! A peer, its sessions and what the workers share with the control thread about it.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwapOption;
use zeroize::Zeroizing;

use crate::cookie::Sender;
use crate::crypto::{blank_secret, Aead, Cipher, Key, Secret};
use crate::noise::Initiation;
use crate::offload::VnetHdr;
use crate::replay::Replay;
use crate::router::Prefix;
use crate::stamps::Stamps;
use crate::timers::{PeerTimers, REJECT_AFTER_MESSAGES, REJECT_AFTER_MS};

/// Locks without poisoning: a panic elsewhere must not stop the tunnel.
pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Where a peer is, and from which of our addresses we answer it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: SocketAddr,
    pub src: Option<IpAddr>,
}

/// One derived session.
pub struct Session {
    pub peer: Arc<Peer>,
    pub local_index: u32,
    pub remote_index: u32,
    pub send: Aead,
    pub recv: Aead,
    pub initiator: bool,
    /// Milliseconds of the device clock.
    pub born: u64,
    counter: AtomicU64,
    pub replay: Mutex<Replay>,
    /// The other end proved it holds the key (always true for the initiator).
    pub confirmed: AtomicBool,
    pub dead: AtomicBool,
}

impl Session {
    #[allow(clippy::too_many_arguments)] // a record made in one place per role
    pub fn new(
        peer: Arc<Peer>,
        local_index: u32,
        remote_index: u32,
        keys: crate::noise::TransportKeys,
        initiator: bool,
        born: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            peer,
            local_index,
            remote_index,
            send: keys.send,
            recv: keys.recv,
            initiator,
            born,
            counter: AtomicU64::new(0),
            replay: Mutex::new(Replay::default()),
            confirmed: AtomicBool::new(initiator),
            dead: AtomicBool::new(false),
        })
    }

    /// A session of another process: `sent` nonces are used up.
    pub fn restored(self: Arc<Self>, sent: u64, replay: Replay, confirmed: bool) -> Arc<Self> {
        self.counter.store(sent, Relaxed);
        *lock(&self.replay) = replay;
        self.confirmed.store(confirmed, Relaxed);
        self
    }

    pub fn age(&self, now: u64) -> u64 {
        now.saturating_sub(self.born)
    }

    pub fn usable(&self, now: u64) -> bool {
        self.age(now) < REJECT_AFTER_MS && !self.dead.load(Relaxed)
    }

    /// Whether it may still encrypt: alive and with nonces left.
    pub fn can_send(&self, now: u64) -> bool {
        self.usable(now) && self.sent() < REJECT_AFTER_MESSAGES
    }

    pub fn sent(&self) -> u64 {
        self.counter.load(Relaxed)
    }

    /// Reserves `n` consecutive nonces; `None` when the session has used up its messages.
    pub fn nonces(&self, n: u64) -> Option<u64> {
        // The look before the add keeps refused calls from ever wrapping the counter.
        if self.counter.load(Relaxed) > REJECT_AFTER_MESSAGES - n {
            return None;
        }
        let first = self.counter.fetch_add(n, Relaxed);
        (first <= REJECT_AFTER_MESSAGES - n).then_some(first)
    }

    #[cfg(test)]
    pub fn set_sent(&self, n: u64) {
        self.counter.store(n, Relaxed);
    }
}

/// The three sessions a peer may have.
#[derive(Default)]
pub struct Keypairs {
    pub previous: Option<Arc<Session>>,
    pub current: Option<Arc<Session>>,
    pub next: Option<Arc<Session>>,
}

/// Handshake state, touched by the control side only.
pub struct Handshake {
    pub psk: Secret,
    pub cipher: Cipher,
    /// Whether the cipher was named over UAPI, so that `get` says it.
    pub cipher_named: bool,
    /// DH of both static keys, made on first use.
    pub static_static: Option<Zeroizing<Key>>,
    pub pending: Option<Box<Initiation>>,
    pub stamps: Stamps,
    /// When an initiation from this peer was last worked on.
    pub last_initiation: Option<u64>,
    pub cookies: Sender,
}

/// A packet that waits for a session.
pub struct Staged {
    pub vnet: VnetHdr,
    pub bytes: Vec<u8>,
}

const STAGED_PACKETS: usize = 128;
const STAGED_BYTES: usize = 512 * 1024;

#[derive(Default)]
pub struct StagedQueue {
    packets: VecDeque<Staged>,
    bytes: usize,
}

impl StagedQueue {
    /// Queues a packet, dropping the oldest ones beyond the bounds.
    pub fn push(&mut self, vnet: VnetHdr, packet: &[u8]) {
        self.bytes += packet.len();
        self.packets.push_back(Staged { vnet, bytes: packet.to_vec() });
        while self.packets.len() > STAGED_PACKETS || self.bytes > STAGED_BYTES {
            let Some(old) = self.packets.pop_front() else { break };
            self.bytes -= old.bytes.len();
        }
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Staged> {
        self.packets.iter()
    }

    pub fn take(&mut self) -> VecDeque<Staged> {
        self.bytes = 0;
        std::mem::take(&mut self.packets)
    }

    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

pub struct Peer {
    pub public: Key,
    pub handshake: Mutex<Handshake>,
    pub keys: Mutex<Keypairs>,
    /// The session to send with; what workers read.
    pub current: ArcSwapOption<Session>,
    pub endpoint: ArcSwapOption<Endpoint>,
    pub rx_bytes: AtomicU64,
    pub tx_bytes: AtomicU64,
    /// Wall clock of the last completed handshake, nanoseconds since the epoch.
    pub last_handshake: AtomicU64,
    pub timers: PeerTimers,
    pub staged: Mutex<StagedQueue>,
    /// Prefixes this peer owns; changed only under the control lock.
    pub allowed: Mutex<BTreeSet<Prefix>>,
    pub dead: AtomicBool,
}

impl Peer {
    pub fn new(public: Key) -> Arc<Self> {
        Arc::new(Self {
            public,
            handshake: Mutex::new(Handshake {
                psk: blank_secret(),
                cipher: Cipher::default(),
                cipher_named: false,
                static_static: None,
                pending: None,
                stamps: Stamps::default(),
                last_initiation: None,
                cookies: Sender::default(),
            }),
            keys: Mutex::new(Keypairs::default()),
            current: ArcSwapOption::empty(),
            endpoint: ArcSwapOption::empty(),
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            last_handshake: AtomicU64::new(0),
            timers: PeerTimers::default(),
            staged: Mutex::new(StagedQueue::default()),
            allowed: Mutex::new(BTreeSet::new()),
            dead: AtomicBool::new(false),
        })
    }

    /// Roams to where an authenticated packet came from.
    #[inline]
    pub fn seen_at(&self, from: &Endpoint) {
        let known = self.endpoint.load();
        if known.as_deref() != Some(from) {
            self.endpoint.store(Some(Arc::new(*from)));
        }
    }

    /// Forgets the local address, so that routing chooses one again.
    pub fn clear_source(&self) {
        if let Some(e) = self.endpoint.load_full() {
            if e.src.is_some() {
                self.endpoint.store(Some(Arc::new(Endpoint { addr: e.addr, src: None })));
            }
        }
    }
}
