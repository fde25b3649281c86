//! Datagram to inner packet: open in place, replay, source check, join for one write.

use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use crate::device::{Core, Now};
use crate::noise::{TYPE_COOKIE, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE};
use crate::offload::{Buffers, Coalescer, Span};
use crate::packet;
use crate::peer::{lock, Endpoint, Session};
use crate::timers::REJECT_AFTER_MESSAGES;
use crate::tx::{DATA_HEADER, OVERHEAD};

/// One received buffer: datagrams of `segment` bytes, the last may be shorter.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    pub buf: usize,
    pub len: usize,
    pub segment: usize,
    pub from: Endpoint,
}

/// Consecutive packets of one session from one place.
struct Run {
    session: Arc<Session>,
    from: Endpoint,
}

pub struct Rx {
    pub coalescer: Coalescer,
    run: Option<Run>,
    opened: Vec<(u64, Span)>,
}

impl Rx {
    pub fn new(coalescer: Coalescer) -> Self {
        Self { coalescer, run: None, opened: Vec::with_capacity(256) }
    }

    /// Works off a batch. Handshake messages go to the control queue; authenticated packets are
    /// in `coalescer.groups()` afterwards, ready to be written. The caller clears it.
    pub fn batch<B: Buffers>(&mut self, core: &Core, now: Now, received: &[Received], bufs: &mut B) {
        for r in received {
            if r.len == 0 {
                continue;
            }
            let step = if r.segment == 0 { r.len } else { r.segment };
            for off in (0..r.len).step_by(step) {
                let span = Span { buf: r.buf, off, len: step.min(r.len - off) };
                self.datagram(core, now, span, &r.from, bufs);
            }
        }
        self.finish_run(core, now, bufs);
        self.coalescer.finish(bufs);
    }

    #[inline]
    fn datagram<B: Buffers>(&mut self, core: &Core, now: Now, span: Span, from: &Endpoint, bufs: &mut B) {
        let b = bufs.bytes_mut(span);
        if b.len() < 4 || b[1..4] != [0, 0, 0] {
            return;
        }
        match b[0] {
            TYPE_DATA if b.len() >= OVERHEAD => {}
            TYPE_INITIATION | TYPE_RESPONSE | TYPE_COOKIE => {
                if core.plausible(b) {
                    core.queue.push_handshake(*from, b);
                }
                return;
            }
            _ => return,
        }
        let index = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        let counter = u64::from_le_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]);
        let same = self.run.as_ref().is_some_and(|r| r.session.local_index == index && r.from == *from);
        if !same {
            self.finish_run(core, now, bufs);
            self.run =
                core.session(index).filter(|s| s.usable(now.ms)).map(|session| Run { session, from: *from });
        }
        let Some(run) = &self.run else { return };
        if counter >= REJECT_AFTER_MESSAGES {
            return;
        }
        let body = Span { buf: span.buf, off: span.off + DATA_HEADER, len: span.len - DATA_HEADER };
        if let Ok(len) = run.session.recv.open(counter, &[], bufs.bytes_mut(body)) {
            self.opened.push((counter, Span { len, ..body }));
        }
    }

    /// Replay check, accounting, timers, roaming and source check, once for the whole run.
    fn finish_run<B: Buffers>(&mut self, core: &Core, now: Now, bufs: &mut B) {
        let Some(run) = self.run.take() else { return };
        if self.opened.is_empty() {
            return;
        }
        let session = &run.session;
        {
            let mut replay = lock(&session.replay);
            self.opened.retain(|(counter, _)| replay.accept(*counter));
        }
        if self.opened.is_empty() {
            return;
        }
        let routes = core.routes.load();
        let mut checked: Option<(IpAddr, bool)> = None;
        let (mut bytes, mut data) = (0, false);
        for (_, span) in self.opened.drain(..) {
            bytes += span.len + OVERHEAD;
            if span.len == 0 {
                continue;
            }
            data = true;
            let Some(inner) = packet::parse(bufs.bytes(span)) else { continue };
            let ok = match checked {
                Some((ip, ok)) if ip == inner.src => ok,
                _ => routes.lookup(inner.src).is_some_and(|p| Arc::ptr_eq(p, &session.peer)),
            };
            checked = Some((inner.src, ok));
            if ok {
                self.coalescer.push(bufs, Span { len: inner.len, ..span });
            }
        }
        let peer = &session.peer;
        peer.rx_bytes.fetch_add(bytes as u64, Relaxed);
        if !peer.dead.load(Relaxed) {
            // Before the confirmation, which sends what waited.
            peer.seen_at(&run.from);
        }
        if !session.confirmed.load(Relaxed) {
            core.confirm(session, now);
        }
        if !peer.dead.load(Relaxed) {
            core.touch_received(session, now.ms, data);
        }
    }
}
