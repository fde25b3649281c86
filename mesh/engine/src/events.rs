//! What workers hand to the control thread: rare, bounded, never data packets.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::noise::INITIATION_LEN;
use crate::peer::{lock, Endpoint, Peer};

/// A handshake message as received.
pub struct HandshakeMessage {
    pub from: Endpoint,
    bytes: [u8; INITIATION_LEN],
    len: usize,
}

impl HandshakeMessage {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

pub enum Event {
    Handshake(HandshakeMessage),
    NeedHandshake(Arc<Peer>),
    /// A timer of this peer became due earlier than the wheel knows.
    Arm(Arc<Peer>, u64),
    /// A session came up: send what waits.
    Flush(Arc<Peer>),
}

/// Handshake messages kept waiting; more are dropped, as the network may drop them.
const MAX_HANDSHAKES: usize = 1024;

#[derive(Default)]
struct Inner {
    handshakes: VecDeque<HandshakeMessage>,
    others: VecDeque<Event>,
}

/// Bounded for what strangers can cause; the rest is bounded by the number of peers.
pub struct Queue {
    inner: Mutex<Inner>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Queue {
    /// `wake` is called after every push that made the queue non-empty.
    pub fn new(wake: Box<dyn Fn() + Send + Sync>) -> Self {
        Self { inner: Mutex::new(Inner::default()), wake }
    }

    pub fn push(&self, event: Event) {
        let first = {
            let mut q = lock(&self.inner);
            let first = q.handshakes.is_empty() && q.others.is_empty();
            match event {
                Event::Handshake(h) => {
                    if q.handshakes.len() >= MAX_HANDSHAKES {
                        return;
                    }
                    q.handshakes.push_back(h);
                }
                other => q.others.push_back(other),
            }
            first
        };
        if first {
            (self.wake)();
        }
    }

    /// Queues a handshake message; anything of another size is dropped.
    pub fn push_handshake(&self, from: Endpoint, msg: &[u8]) {
        if msg.len() <= INITIATION_LEN {
            let mut bytes = [0; INITIATION_LEN];
            bytes[..msg.len()].copy_from_slice(msg);
            self.push(Event::Handshake(HandshakeMessage { from, bytes, len: msg.len() }));
        }
    }

    /// The next event, own affairs first, and how many handshakes still wait.
    pub fn pop(&self) -> Option<(Event, usize)> {
        let mut q = lock(&self.inner);
        let event = match q.others.pop_front() {
            Some(e) => e,
            None => Event::Handshake(q.handshakes.pop_front()?),
        };
        Some((event, q.handshakes.len()))
    }
}
